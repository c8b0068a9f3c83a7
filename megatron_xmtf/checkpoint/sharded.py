"""Save and load checkpoints through Megatron-Core's dist_checkpointing; they know no parallel layout.

    all ranks        rank 0 names a fresh temporary directory; each rank writes its shards into it
    all ranks        hash what they wrote
    rank 0           carries the Hugging Face side files along, writes the manifest, renames
    load             any TP x PP x DP: each rank reads the parts of the global tensors that it needs

RNG states are stored as plain tensors over (pp, tp, dp) and taken up again at the same layout only.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from megatron_xmtf.checkpoint.manifest import (
    CheckpointManifest,
    begin_checkpoint,
    discard_checkpoint,
    finish_checkpoint,
    hash_files,
    open_manifest,
)
from megatron_xmtf.checkpoint.safe_read import check_safe
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError, DiskFullError
from megatron_xmtf.models.architecture import architecture_from_mapping

__all__ = ["current_layout", "load_model_weights", "load_training_state", "save_checkpoint"]

SHARDING = {
    # One key a layer, so that names are those of `conversion.mapping` and any pipeline split reads them.
    "non_homogeneous_layers": True,
    # Moments in the shape of their parameters: the one format of the distributed optimizer that any layout reads.
    "distrib_optim_sharding_type": "fully_reshardable",
}


EXTRA_STATE = "_extra_state"


def current_layout() -> dict[str, int]:
    """Return the parallel sizes of the running job; RNG states can be taken up at the same ones only."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def save_checkpoint(
    path: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    step: int,
    config: RunConfig,
    consumed_rows: int,
    hf_files: Path,
) -> None:
    """Write a checkpoint; every rank calls it, and `path` exists afterwards, whole, or an error is raised on all.

    Args:    path: final directory. optimizer: None leaves optimizer and RNG states out.
             consumed_rows: rows trained on so far. hf_files: directory with config.json and tokenizer files.
    Raises:  ConfigError: `path` exists. DiskFullError: no space. CheckpointError: a rank failed to write.
    """
    temporary = Path(_from_rank_zero(lambda: str(begin_checkpoint(path))))
    try:
        failures: dict[int, str] = {}
        try:
            state = _state(chunks, optimizer, is_loading=False)
            dist_checkpointing.save(state, str(temporary), content_metadata=SHARDING)
        except OSError as error:
            failures = {torch.distributed.get_rank(): str(error)}
        except CheckpointException as error:  # no subclass of Exception; on all ranks, the causes on one
            failures = {rank: str(cause) for rank, (cause, _) in error.failures.items()}
        _raise_together(failures, path)
        hashes = _shard_hashes(temporary)
        architecture = unwrap_model(chunks[0]).architecture

        def publish() -> None:
            shutil.copytree(hf_files, temporary / "hf")
            finish_checkpoint(
                temporary,
                path,
                step=step,
                architecture=architecture.to_mapping(),
                dtype=str(next(chunks[0].parameters()).dtype).removeprefix("torch."),
                config=config.model_dump(mode="json"),
                consumed_rows=consumed_rows,
                contents=["model"] if optimizer is None else ["model", "optimizer", "rng"],
                hashes=hashes,
            )

        _from_rank_zero(publish)
    finally:
        if torch.distributed.get_rank() == 0:
            discard_checkpoint(temporary)


def load_model_weights(chunks: Sequence[torch.nn.Module], checkpoint: Path) -> CheckpointManifest:
    """Load the weights of a checkpoint into this rank's chunks, at any layout.

    Raises:  MissingError, CorruptCheckpointError: not there, not whole, unsafe. CheckpointError: another model.
    """
    manifest = _open_checked(chunks, checkpoint)
    state = _model_state(chunks)
    loaded = _load(state, checkpoint)
    _take_up_weights(chunks, loaded)
    return manifest


def load_training_state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, checkpoint: Path
) -> CheckpointManifest:
    """Load weights, optimizer state and (at the same layout) RNG states, to go on where the checkpoint was made.

    Raises:  as `load_model_weights`; CheckpointError: it holds no optimizer state.
    """
    manifest = _open_checked(chunks, checkpoint)
    if "optimizer" not in manifest.contents:
        raise CheckpointError(
            f"{checkpoint} holds {', '.join(manifest.contents)} but no optimizer state: it cannot be resumed. "
            "Start a new run with model=CHECKPOINT, or save with checkpoint.save_optimizer=true."
        )
    same_layout = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("layout") == current_layout()
    state = _state(chunks, optimizer, is_loading=True)
    if not same_layout:
        for key in [key for key in state if key.startswith("rng.")]:
            del state[key]
    loaded = _load(state, checkpoint)
    _take_up_weights(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _set_rng_states({key: loaded[key] for key in loaded if key.startswith("rng.")})
    return manifest


def _open_checked(chunks: Sequence[torch.nn.Module], checkpoint: Path) -> CheckpointManifest:
    """Verify that the checkpoint is whole, harmless and of this architecture."""
    manifest = open_manifest(checkpoint)
    check_safe(checkpoint)
    wanted = unwrap_model(chunks[0]).architecture
    found = architecture_from_mapping(manifest.architecture)
    if found != wanted:
        differing = [key for key, value in wanted.to_mapping().items() if found.to_mapping()[key] != value]
        raise CheckpointError(
            f"{checkpoint} holds another model: "
            + ", ".join(f"{key} is {found.to_mapping()[key]}, not {wanted.to_mapping()[key]}" for key in differing)
            + ". Give the checkpoint of this model."
        )
    return manifest


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
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


def _state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    """Return all that a checkpoint holds, as Megatron-Core's sharded tensors."""
    state = _model_state(chunks)
    if optimizer is None:
        return state
    model_state = dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(SHARDING))
    state["layout"] = current_layout()
    state.update(_rng_states())
    return state


def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise CorruptCheckpointError(
            f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}. `xmtf inspect --deep {checkpoint}` tells "
            "whether it was altered."
        ) from error
    return loaded


def _take_up_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        model = unwrap_model(chunk)
        empty = {name: None for name in model.state_dict() if name.endswith(EXTRA_STATE)}
        model.load_state_dict({**loaded[f"model{number}"], **empty}, strict=True)


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


def _set_rng_states(states: dict[str, torch.Tensor]) -> None:
    named = {key.removeprefix("rng."): state.reshape(-1).cpu() for key, state in states.items()}
    torch.set_rng_state(named.pop("torch"))
    if "cuda" in named:
        torch.cuda.set_rng_state(named.pop("cuda"))
    get_cuda_rng_tracker().set_states(named)


def _from_rank_zero(function: Callable[[], Any]) -> Any:
    """Run `function` on rank 0 and hand its result, or its error, to all ranks."""
    holder: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            holder[0] = function()
        except Exception as error:  # whatever it is, it is raised on every rank; the others must not wait for it
            holder[1] = error
    torch.distributed.broadcast_object_list(holder, src=0)
    if holder[1] is not None:
        raise holder[1]
    return holder[0]


def _shard_hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every shard; each rank reads its own, one reader would take hours for a large model."""
    own = [path.name for path in directory.glob(f"__{torch.distributed.get_rank()}_*.distcp")]
    gathered: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, hash_files(directory, own))
    return {name: digest for hashes in gathered for name, digest in hashes.items()}


def _raise_together(failures: dict[int, str], path: Path) -> None:
    """Raise on every rank if any rank could not write; the message names the ranks.

    Args:    failures: rank -> cause, as far as this rank knows.
    Raises:  DiskFullError: no space or no quota left. CheckpointError: any other cause.
    """
    gathered: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, failures)
    causes = {rank: cause for known in gathered for rank, cause in known.items()}
    if not causes:
        return
    named = "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items())[:3])
    message = (
        f"checkpoint {path} could not be written: {named}. Nothing of it is left, and the one before is untouched."
    )
    if any(os.strerror(code) in named for code in (errno.ENOSPC, errno.EDQUOT)):
        raise DiskFullError(f"{message} Free space, or keep fewer (checkpoint.keep_last, keep_every), and resume.")
    raise CheckpointError(message)
