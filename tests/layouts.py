"""Parallel layouts that every numerical test goes through, as values of the `parallel` section."""

from __future__ import annotations

from typing import Any

from megatron_xmtf.config import ParallelConfig

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
COUNTED = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # name: ranks, parallel section
    "TP2": (2, {TP: 2}),
    "PP2": (2, {PP: 2}),
    "TP2-PP2": (4, {TP: 2, PP: 2}),
    "DP2": (2, {}),
    "TP2-SP": (2, {TP: 2, "sequence_parallel": True}),
    "PP2-VPP2": (2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}),
    "PP2-uneven-1-3": (
        2,
        {PP: 2, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
    ),
    # Four layers, embedding and loss counted as one each: six stages, or six chunks, whose ends hold no layer at all.
    "PP6-counted": (6, {PP: 6, **COUNTED}),
    "PP2-VPP3-counted": (2, {PP: 2, "virtual_pipeline_model_parallel_size": 3, **COUNTED}),
    "DP2-distributed-optimizer": (2, {"use_distributed_optimizer": True}),
    "TP2-SP-PP2-distributed-optimizer": (
        4,
        {TP: 2, PP: 2, "sequence_parallel": True, "use_distributed_optimizer": True},
    ),
    "DP2-overlap": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
}


def layout(name: str) -> tuple[int, ParallelConfig]:
    """Return (ranks, parallel section) of a layout."""
    world_size, section = LAYOUTS[name]
    return world_size, ParallelConfig(**section)
