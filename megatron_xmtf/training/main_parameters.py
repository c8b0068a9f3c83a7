"""Start the fp32 main parameters of a half-precision run from what the checkpoint holds, not from rounded weights.

Megatron-Core copies them from the model's weights, which are rounded to the run's precision by then:

    checkpoint, fp32       0.1503    0.0719
    weights, bf16          0.1504    0.0718       rounded: 8 bits of significand
    main, copied           0.1504    0.0718       on the grid of bf16: moves once updates add up to half a step
    main, from here        0.1503    0.0719       anywhere between: some weights move at every update

At 0.15 half a step is 4.9e-4, and Adam moves a weight by about its rate. Started on the grid, every weight
stands still for its first updates and then all move together: twenty steps of the tiny model in bf16 at 2e-5 were up to
0.097 off the losses in fp32, and 0.003 started from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.checkpoint.manifest import open_manifest

__all__ = ["load_main_parameters"]


def load_main_parameters(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, checkpoint: Path
) -> dict[str, int]:
    """Overwrite this rank's main parameters with the checkpoint's values; every rank calls it.

    Nothing is read where there is nothing to gain: the checkpoint's precision is the run's own, or the run is fp32.
    Takes 4 bytes of CPU memory a parameter of the rank while it runs.

    Args:    optimizer: built over `chunks`. checkpoint: whole and of this model (`load_model_weights` has checked).
    Returns: name -> numbers written on this rank.
    """
    run_dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
    if run_dtype == "float32" or open_manifest(checkpoint).dtype == run_dtype:
        return {}
    weights = [_weights(chunk) for chunk in chunks]
    # All chunks in one call: the tied embedding of one is the first copy of that of another.
    loaded = dist_checkpointing.load(
        {f"model{number}": _on_cpu_in_fp32(of_chunk) for number, of_chunk in enumerate(weights)}, str(checkpoint)
    )
    written: dict[str, int] = {}
    for number, of_chunk in enumerate(weights):
        for name, weight in of_chunk.items():
            written[weight.key] = _write(weight.data, loaded[f"model{number}"][name], optimizer)
    return written


def _weights(chunk: torch.nn.Module) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Return this rank's weights; a factory is a gated layer, whose two halves are split each by itself."""
    state = unwrap_model(chunk).sharded_state_dict(metadata={"non_homogeneous_layers": True})
    return {name: value for name, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}


def _on_cpu_in_fp32(
    weights: dict[str, ShardedTensor | ShardedTensorFactory],
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    found: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    for name, weight in weights.items():
        data = torch.empty(weight.data.shape, dtype=torch.float32)
        if isinstance(weight, ShardedTensor):
            found[name] = replace(weight, data=data, dtype=torch.float32)
        else:
            found[name] = replace(weight, data=data)
    return found


@torch.no_grad()
def _write(parameter: Any, values: Tensor, optimizer: MegatronOptimizer) -> int:
    """Write a parameter's values into this rank's part of its main parameter; return how many."""
    main: Tensor | None = parameter.main_param
    if main is None:  # the distributed optimizer updates it on other ranks
        return 0
    if main.numel() != parameter.numel() or main.dim() != parameter.dim():
        values = values.flatten()[_own_range(parameter, optimizer)]
    main.copy_(values.view_as(main))
    return main.numel()


def _own_range(parameter: Any, optimizer: MegatronOptimizer) -> slice:
    """Return the part of the flattened parameter that this rank updates."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    [owner] = [
        part for part in parts if isinstance(part, DistributedOptimizer) and parameter in part.model_param_gbuf_map
    ]
    span = owner._get_model_param_range_map(parameter)["param"]
    return slice(span.start, span.end)
