"""What a training holds, as parts of global tensors: weights, optimizer, RNG states.

    weights, RNG states, state of an optimizer that is whole    Megatron-Core's sharded tensors
    state of the distributed optimizer                          boxes, see `optimizer_shards.py`

RNG states are stored as plain tensors over (pp, tp, dp), so that a checkpoint needs no pickled object; they are taken
up again at the same layout only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_xmtf.checkpoint.optimizer_shards import StateBox, distributed_part, optimizer_boxes

__all__ = [
    "EXTRA_STATE",
    "SHARDING",
    "TrainingState",
    "current_layout",
    "model_state",
    "set_rng_states",
    "training_state",
]

SHARDING = {
    # One key a layer, so that names are those of `conversion.mapping` and any pipeline split reads them.
    "non_homogeneous_layers": True,
    # Moments in the shape of their parameters. What the distributed optimizer's boxes make is this format, too.
    "distrib_optim_sharding_type": "fully_reshardable",
}

EXTRA_STATE = "_extra_state"


def current_layout() -> dict[str, int]:
    """Return the parallel sizes of the running job, and `cuda` on GPUs; RNG states can be taken up at the same only.

    A GPU's states are of other sizes than a CPU's, and it has one more.
    """
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        **({"cuda": 1} if torch.cuda.is_available() else {}),
    }


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state dict of the model; one entry a chunk, all with global names.

    Megatron-Core's linear layers add an empty `_extra_state` object each (for Transformer Engine's fp8); an empty
    pickled object is all it would be, so it is left out.
    """
    return {
        f"model{number}": {
            name: value
            for name, value in unwrap_model(chunk).sharded_state_dict(metadata=dict(SHARDING)).items()
            if not name.endswith(EXTRA_STATE)
        }
        for number, chunk in enumerate(chunks)
    }


@dataclass(frozen=True)
class TrainingState:
    """What one rank holds of a checkpoint."""

    sharded: dict[str, Any]
    """Megatron-Core's sharded state dict, and what is the same on all ranks."""
    boxes: list[StateBox]
    """State of the distributed optimizer; empty: the optimizer is of another kind."""


def training_state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool = False
) -> TrainingState:
    """Return all that a checkpoint holds; the tensors are those of the running training."""
    state = model_state(chunks)
    weights = dict(state)
    if not is_loading:
        state["content_metadata"] = dict(SHARDING)  # where Megatron-Core's own `save` keeps it
    if optimizer is None:
        return TrainingState(state, [])
    distributed = distributed_part(optimizer)
    if is_loading and distributed is not None:
        with torch.no_grad():
            distributed.load_state_dict(distributed.state_dict())  # makes room for the moments
    if not is_loading:
        _begin_state(optimizer)
    boxes: list[StateBox] = []
    if distributed is None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(SHARDING))
    else:
        boxes = optimizer_boxes(distributed, weights)
        if not is_loading:
            state["optimizer"] = distributed.state_dict()
    state["layout"] = current_layout()
    state.update(_rng_states())
    return TrainingState(state, boxes)


def _begin_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped yet its first state, zeros.

    fp16's first steps may all overflow: without this a checkpoint of then holds no moments, and cannot be loaded.
    """
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if not part.optimizer.state and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


def _rng_states() -> dict[str, ShardedTensor]:
    """Return every RNG state as a uint8 tensor [pp, tp, dp, bytes], so that a checkpoint needs no pickled object."""
    states = {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    layout = current_layout()
    return {
        f"rng.{name}": ShardedTensor.from_rank_offsets(
            f"rng.{name}",
            state.clone()[None, None, None],
            (0, parallel_state.get_pipeline_model_parallel_rank(), layout["pp"]),
            (1, parallel_state.get_tensor_model_parallel_rank(), layout["tp"]),
            (2, parallel_state.get_data_parallel_rank(), layout["dp"]),
        )
        for name, state in states.items()
    }


def set_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Take up RNG states as `training_state` stored them, `rng.<name>` -> uint8 [1, 1, 1, bytes]."""
    named = {key.removeprefix("rng."): state.reshape(-1).cpu() for key, state in states.items()}
    torch.set_rng_state(named.pop("torch"))
    if "cuda" in named:
        torch.cuda.set_rng_state(named.pop("cuda"))
    get_cuda_rng_tracker().set_states(named)
