"""Faults of Megatron-Core that raise nothing: each is shown to happen without its cure and not to happen with it.

The fifth, torch Adam's shared step count, is in tests/training/test_optimizer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel

DP2 = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}


# Point-to-point batching on gloo


def pipeline_gradients(parallel: dict[str, Any], batched: bool | None) -> dict[str, np.ndarray]:
    """Return this rank's gradients of eight micro-batches by name; `batched` overrides batch_p2p_comm."""
    from megatron.core.utils import get_model_config

    from tests.parallel.tiny_engine import build_engine, forward_backward, named_weights, run_config, tiny_batches

    config = run_config(**parallel)
    initialize_parallel(config.parallel, seed=1)
    engine = build_engine(config)
    assert get_model_config(engine.chunks[0]).batch_p2p_comm is False, "our configuration is the cure"
    if batched is not None:
        get_model_config(engine.chunks[0]).batch_p2p_comm = batched
    forward_backward(engine.chunks, tiny_batches(8))
    by_pointer = {tensor.data_ptr(): name for name, tensor in named_weights(engine.chunks).items()}
    return {
        by_pointer[parameter.data_ptr()]: parameter.main_grad.numpy().copy()
        for chunk in engine.chunks
        for parameter in chunk.parameters()
    }


def worst_relative_difference(found: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> float:
    worst = 0.0
    for gradients in found:
        for name, gradient in gradients.items():
            scale = np.abs(expected[name]).max()
            worst = max(worst, float(np.abs(gradient - expected[name]).max() / scale))
    return worst


def test_batched_point_to_point_swaps_tensors_under_a_virtual_pipeline() -> None:
    expected = run_ranks(pipeline_gradients, world_size=1, arguments=({}, None))[0]
    virtual = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    ours = run_ranks(pipeline_gradients, world_size=2, arguments=(virtual, None))
    assert set().union(*ours) == expected.keys()
    assert worst_relative_difference(ours, expected) <= 1e-4
    batched = run_ranks(pipeline_gradients, world_size=2, arguments=(virtual, True))
    assert worst_relative_difference(batched, expected) > 0.1


# RNG states over tensor-parallel ranks


def dropout_masks(without: list[str]) -> tuple[list[bool], list[bool]]:
    """Return a mask drawn where heads are split and one drawn where tensor-parallel ranks hold copies."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_xmtf.config import ParallelConfig
    from megatron_xmtf.parallel.cpu_device import enter_cpu_device

    enter_cpu_device(without=without)
    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    with get_cuda_rng_tracker().fork():
        split = torch.dropout(torch.ones(200), 0.5, train=True) > 0
    return split.tolist(), (torch.dropout(torch.ones(200), 0.5, train=True) > 0).tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a trap of the CPU adapter")
def test_dropout_differs_between_heads_of_tensor_parallel_ranks() -> None:
    (split0, copy0), (split1, copy1) = run_ranks(dropout_masks, world_size=2, arguments=([],))
    assert split0 != split1
    assert copy0 == copy1
    (split0, _), (split1, _) = run_ranks(dropout_masks, world_size=2, arguments=(["manual_seed"],))
    assert split0 == split1, "without the patch all ranks drop the same"


# Bucket padding in a fully_reshardable checkpoint


def moments_after_reload(directory: Path, stored_by: str) -> tuple[int, float]:
    """Train two steps, save the optimizer, load it into a fresh one; return (buckets, worst moment difference)."""
    from megatron.core import dist_checkpointing

    from megatron_xmtf.checkpoint.sharded import load_training_state
    from tests.parallel.tiny_engine import SHARDING, Engine, build_engine, run_config, save_checkpoint, tiny_batches

    config = run_config(**DP2)
    topology = initialize_parallel(config.parallel, seed=1)

    def state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
        model = engine.chunks[0].module.sharded_state_dict(metadata=dict(SHARDING))
        model = {name: value for name, value in model.items() if not name.endswith("_extra_state")}
        return engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(SHARDING))

    def moments(engine: Engine) -> list[torch.Tensor]:
        # Shards of this rank, in the order of the parameter groups.
        parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
        inner = parts[0].optimizer
        shards = [shard for group in inner.param_groups for shard in group["params"]]
        return [inner.state[shard][name].clone() for shard in shards for name in ("exp_avg", "exp_avg_sq")]

    trained, fresh = (build_engine(config, bucket_size=20_000) for _ in range(2))
    for step in range(2):
        trained.train_step(tiny_batches(2, skip=4 * step + 2 * topology.dp_rank))
    if stored_by == "boxes":
        save_checkpoint(trained, directory / "step_0000002", side_files=directory)
        load_training_state(fresh.chunks, fresh.optimizer, directory / "step_0000002")
    else:
        dist_checkpointing.save(state(trained, is_loading=False), str(directory), content_metadata=SHARDING)
        loaded = dist_checkpointing.load(state(fresh, is_loading=True), str(directory))
        with torch.no_grad():
            fresh.optimizer.load_state_dict(loaded)
    pairs = zip(moments(trained), moments(fresh), strict=True)
    worst = max(float((before - after).abs().max()) for before, after in pairs if before.numel())
    return len(trained.chunks[0].buffers[0].buckets), worst


def test_bucket_padding_shifts_moments_that_megatron_core_gathers_and_not_our_boxes(tmp_path: Path) -> None:
    for name in ("boxes", "gathered"):
        (tmp_path / name).mkdir()
    for buckets, worst in run_ranks(moments_after_reload, world_size=2, arguments=(tmp_path / "boxes", "boxes")):
        assert buckets > 2
        assert worst == 0.0
    gathered = run_ranks(moments_after_reload, world_size=2, arguments=(tmp_path / "gathered", "gathered"))
    assert max(worst for _, worst in gathered) > 1e-6


# Stale weights under parameter-gather overlap


def weights_read_after_a_step(is_gathered: bool) -> dict[str, np.ndarray]:
    """Return the weights that a checkpoint written right after a step would hold."""
    import contextlib

    from megatron_xmtf.training.trainer import _parameters_gathered
    from tests.parallel.tiny_engine import build_engine, named_weights, run_config, tiny_batches

    config = run_config(**DP2, overlap_param_gather=True)
    topology = initialize_parallel(config.parallel, seed=1)
    engine = build_engine(config)
    for step in range(2):
        engine.train_step(tiny_batches(2, skip=4 * step + 2 * topology.dp_rank))
    with _parameters_gathered(engine.chunks, config) if is_gathered else contextlib.nullcontext():
        return {name: tensor.detach().numpy().copy() for name, tensor in named_weights(engine.chunks).items()}


def weights_without_overlap() -> dict[str, np.ndarray]:
    """Return the same weights from a run that gathers them at once."""
    from tests.parallel.tiny_engine import build_engine, named_weights, run_config, tiny_batches

    config = run_config(**DP2)
    topology = initialize_parallel(config.parallel, seed=1)
    engine = build_engine(config)
    for step in range(2):
        engine.train_step(tiny_batches(2, skip=4 * step + 2 * topology.dp_rank))
    return {name: tensor.detach().numpy().copy() for name, tensor in named_weights(engine.chunks).items()}


def test_weights_read_without_a_gather_are_those_of_the_step_before() -> None:
    expected = run_ranks(weights_without_overlap, world_size=2)[0]

    def worst(found: dict[str, np.ndarray]) -> float:
        return max(float(np.abs(found[name] - value).max()) for name, value in expected.items())

    for found in run_ranks(weights_read_after_a_step, world_size=2, arguments=(True,)):
        assert worst(found) == 0.0
    stale = run_ranks(weights_read_after_a_step, world_size=2, arguments=(False,))
    # An Adam step moves a weight by about the learning rate, 1e-2.
    assert all(worst(found) > 1e-3 for found in stale)
