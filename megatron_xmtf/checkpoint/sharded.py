"""Load checkpoints through Megatron-Core's dist_checkpointing, at any parallel layout, verified before they are read.

    all ranks    sizes and names against the manifest; each hashes a share of the files; one verdict
    all ranks    what is a pickle goes through `safe_read`, which runs nothing
    all ranks    each reads the parts of the global tensors that it needs, at any TP x PP x DP

RNG states are taken up again at the same layout only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from megatron_xmtf.checkpoint.agreement import has_lost_contact, together
from megatron_xmtf.checkpoint.manifest import CheckpointManifest, open_manifest, verify_hashes
from megatron_xmtf.checkpoint.optimizer_shards import StateBox, read_boxes
from megatron_xmtf.checkpoint.reader import CheckpointReader, check_safe
from megatron_xmtf.checkpoint.state import EXTRA_STATE, current_layout, model_state, set_rng_states, training_state
from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError, RankFailedError, XmtfError
from megatron_xmtf.models.architecture import architecture_from_mapping

__all__ = ["load_model_weights", "load_training_state", "share_of_files", "verify_together"]

logger = logging.getLogger(__name__)


def load_model_weights(
    chunks: Sequence[torch.nn.Module], checkpoint: Path, *, verify: bool = True
) -> CheckpointManifest:
    """Load the weights of a checkpoint into this rank's chunks, at any layout; every rank calls it.

    Args:    verify: compare every file's SHA-256 with the manifest's first; sizes always are.
    Raises:  MissingError, CorruptCheckpointError: not there, not whole, unsafe. CheckpointError: another model.
             RankFailedError: another rank ended meanwhile.
    """
    manifest = _open_checked(chunks, checkpoint, verify=verify)
    state = model_state(chunks)
    loaded = _load(state, checkpoint)
    _take_up_weights(chunks, loaded)
    return manifest


def load_training_state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, checkpoint: Path, *, verify: bool = True
) -> CheckpointManifest:
    """Load weights, optimizer state and (at the same layout) RNG states, to go on where the checkpoint was made.

    Args:    verify: as `load_model_weights`.
    Raises:  as `load_model_weights`; CheckpointError: it holds no optimizer state.
    """
    manifest = _open_checked(chunks, checkpoint, verify=verify)
    if "optimizer" not in manifest.contents:
        raise CheckpointError(
            f"{checkpoint} holds {', '.join(manifest.contents)} but no optimizer state: it cannot be resumed. "
            "Start a new run with model=CHECKPOINT, or save with checkpoint.save_optimizer=true."
        )
    common = together(lambda: dist_checkpointing.load_common_state_dict(str(checkpoint)))
    same_layout = common.get("layout") == current_layout()
    state = training_state(chunks, optimizer, is_loading=True)
    if not same_layout:
        for key in [key for key in state.sharded if key.startswith("rng.")]:
            del state.sharded[key]
    loaded = _load(state.sharded, checkpoint)
    _take_up_weights(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(_with_groups(loaded["optimizer"], is_distributed=bool(state.boxes)))
    if state.boxes:
        together(lambda: _read_boxes(state.boxes, checkpoint))
    if same_layout:
        set_rng_states({key: loaded[key] for key in loaded if key.startswith("rng.")})
    return manifest


def verify_together(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Compare every file with its SHA-256 in the manifest, each rank a share; every rank calls it.

    Raises:  CorruptCheckpointError: on all ranks; names the altered files of the lowest rank that found one.
    """
    started = time.monotonic()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = share_of_files(manifest, ranks)[rank]
    together(lambda: verify_hashes(checkpoint, manifest, names=names))
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info(
        "verified %.2f GB of %s in %.1f s (%.2f GB/s on %d ranks)",
        manifest.total_bytes / 1e9,
        checkpoint,
        seconds,
        manifest.total_bytes / 1e9 / seconds,
        ranks,
    )


def share_of_files(manifest: CheckpointManifest, ranks: int) -> list[list[str]]:
    """Deal the files to ranks so that each reads about as much, the largest first; the same on every rank."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for name, entry in sorted(manifest.files.items(), key=lambda pair: (-pair[1].bytes, pair[0])):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += entry.bytes
    return shares


def _open_checked(chunks: Sequence[torch.nn.Module], checkpoint: Path, *, verify: bool) -> CheckpointManifest:
    """Verify that the checkpoint is whole, harmless and of this architecture."""
    manifest: CheckpointManifest = together(lambda: open_manifest(checkpoint))
    if verify:
        verify_together(checkpoint, manifest)
    together(lambda: check_safe(checkpoint))
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


def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    except CheckpointException as error:  # no subclass of Exception; raised on all ranks, with the causes
        raise _cannot_load(checkpoint, next((cause for cause, _ in error.failures.values()), error)) from error
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise _cannot_load(checkpoint, error) from error
    return loaded


def _with_groups(found: dict[str, Any], *, is_distributed: bool) -> dict[str, Any]:
    """Put the parameter groups where this run's optimizer looks for them, whichever kind saved them.

    distributed, half precision     {"optimizer": {"param_groups": [{lr, step ...}]}}
    whole, fp32                     {"param_groups": [{lr, step ..., params}]}        `params` is this run's own
    """
    nested, own = found.get("optimizer", {}).get("param_groups"), found.get("param_groups")
    if is_distributed and nested is None:
        return {**found, "optimizer": {"param_groups": own}}
    if own is not None and nested is not None:
        groups = [{**saved, **group} for saved, group in zip(nested, own, strict=True)]
        return {**{key: value for key, value in found.items() if key != "optimizer"}, "param_groups": groups}
    return found


def _read_boxes(boxes: Sequence[StateBox], checkpoint: Path) -> None:
    with CheckpointReader(checkpoint) as reader:
        read_boxes(reader, boxes)


def _cannot_load(checkpoint: Path, cause: BaseException) -> XmtfError:
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    if has_lost_contact(cause):
        return RankFailedError(
            f"another rank ended while {checkpoint} was loaded: {reason}. The checkpoint is only read; look for the "
            "error of the rank that ended, and start again."
        )
    return CorruptCheckpointError(
        f"{checkpoint} cannot be loaded: {reason}. `xmtf inspect --deep {checkpoint}` tells whether it was altered."
    )


def _take_up_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        model = unwrap_model(chunk)
        empty = {name: None for name in model.state_dict() if name.endswith(EXTRA_STATE)}
        model.load_state_dict({**loaded[f"model{number}"], **empty}, strict=True)
