"""Find the checkpoint that a path means: one itself, a run's newest, or a named step.

    OUT/checkpoints/step_0000020/manifest.json     a finished checkpoint
    OUT/checkpoints/step_0000040.tmp-1a2b3c4d/     left by a killed writer, never looked at

The scan is the truth: there is no tracker file, and order is by step number, never by time.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, open_manifest
from megatron_xmtf.errors import CorruptCheckpointError, MissingError
from megatron_xmtf.files import require_directory

__all__ = ["find_checkpoint", "list_checkpoints", "step_directory"]

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


def find_checkpoint(path: Path | str, *, skip_damaged: bool = False) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest finished one of a run.

    Args:    path: a checkpoint, a run directory (with `checkpoints/`), or a directory of `step_N` checkpoints.
             skip_damaged: go back to the next older one, with a warning, when the newest is not whole.
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
    for position, candidate in enumerate(candidates):
        try:
            open_manifest(candidate)
        except CorruptCheckpointError as error:
            older = candidates[position + 1] if position + 1 < len(candidates) else None
            if not skip_damaged or older is None:
                remedy = f" The next older one is {older}." if older else " There is no older one."
                raise CorruptCheckpointError(f"{error}{remedy}") from error
            logger.warning("%s Going back to %s.", error, older)
        else:
            return candidate
    raise AssertionError("the loop returns or raises")
