"""Find the checkpoint that a path means: one itself, a run's newest, or a named step.

    OUT/checkpoints/step_0000020/manifest.json     a finished checkpoint
    OUT/checkpoints/step_0000040.tmp-1a2b3c4d/     left by a killed writer, never looked at

The scan is the truth: there is no tracker file, and order is by step number, never by time.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, open_manifest, verify_hashes
from megatron_xmtf.errors import CorruptCheckpointError, MissingError
from megatron_xmtf.files import require_directory

__all__ = ["find_checkpoint", "find_newest_valid", "list_checkpoints", "step_directory"]

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step_(\d+)")


def step_directory(checkpoints: Path | str, step: int) -> Path:
    """Name the directory of one step: `checkpoints/step_0000020`."""
    return Path(checkpoints) / f"step_{step:07d}"


def list_checkpoints(path: Path | str) -> list[tuple[int, Path]]:
    """List `(step, directory)` of the finished checkpoints of a run or checkpoints directory, oldest first."""
    path = require_directory(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = []
    for child in root.iterdir():
        match = STEP_NAME.fullmatch(child.name)
        if match and (child / MANIFEST_NAME).is_file():
            found.append((int(match[1]), child))
    return sorted(found)


def find_checkpoint(path: Path | str) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest finished one of a run.

    Args:    path: a checkpoint, a run directory (with `checkpoints/`), or a directory of `step_N` checkpoints.
    Raises:  MissingError: nothing there. CorruptCheckpointError: it is not whole; names the next older one.
    """
    path = require_directory(path)
    if (path / MANIFEST_NAME).is_file():
        open_manifest(path)
        return path
    candidates = [directory for _, directory in reversed(list_checkpoints(path))]
    if not candidates:
        hint = ""
        if (path / "config.json").is_file():
            hint = " It looks like a Hugging Face model: `xmtf import --hf DIR --output CKPT` makes a checkpoint of it."
        raise MissingError(
            f"{path} is neither a checkpoint ({MANIFEST_NAME}) nor a directory of finished ones "
            f"(step_0000020, or checkpoints/step_0000020).{hint}"
        )
    try:
        open_manifest(candidates[0])
    except CorruptCheckpointError as error:
        older = f"The next older one is {candidates[1]}" if len(candidates) > 1 else "There is no older one"
        raise CorruptCheckpointError(f"{error} {older}.") from error
    return candidates[0]


def find_newest_valid(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose every file has the manifest's hash, and set damaged newer ones aside.

    Each damaged one is told as an error and renamed to `damaged_step_N`, never deleted: its step will be trained and
    saved again, under its name.

    Returns: None if the directory has never held a checkpoint.
    Raises:  CorruptCheckpointError: there are checkpoints and none is whole; nothing is renamed then.
    """
    steps = [(int(match[1]), child) for child in checkpoints.iterdir() if (match := STEP_NAME.fullmatch(child.name))]
    damaged: list[tuple[Path, CorruptCheckpointError]] = []
    for _, directory in sorted(steps, reverse=True):
        try:
            verify_hashes(directory, open_manifest(directory))
        except CorruptCheckpointError as error:
            damaged.append((directory, error))
            continue
        for broken, reason in damaged:
            aside = _unused_name(broken.with_name(f"damaged_{broken.name}"))
            os.replace(broken, aside)
            logger.error("DAMAGED CHECKPOINT, set aside as %s: %s The run goes back to %s.", aside, reason, directory)
        return directory
    if damaged:
        raise CorruptCheckpointError(
            f"none of the {len(damaged)} checkpoints in {checkpoints} is whole. The newest: {damaged[0][1]}"
        )
    return None


def _unused_name(path: Path) -> Path:
    """Return `path`, or the first of `path-2`, `path-3` ... that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
