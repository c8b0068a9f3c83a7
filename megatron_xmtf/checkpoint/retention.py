"""Remove old checkpoints once a newer one is whole: keep the last few and every n-th."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from megatron_xmtf.checkpoint.directory import list_checkpoints
from megatron_xmtf.files import TEMPORARY_MARK, temporary_name

__all__ = ["prune_checkpoints"]

logger = logging.getLogger(__name__)


def prune_checkpoints(checkpoints: Path, *, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete the finished checkpoints that no rule keeps, and what killed writers left; return the deleted steps.

    A checkpoint is renamed before its files go, so that a half-deleted one is never found.

    Args:    keep_last: newest ones kept, at least 2. keep_every: steps that are multiples of it are kept; None: none.
    """
    assert keep_last >= 2, "the newest checkpoint may be the damaged one"
    for left_over in checkpoints.glob(f"*{TEMPORARY_MARK}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    deleted = []
    for step, directory in list_checkpoints(checkpoints)[:-keep_last]:
        if keep_every is not None and step % keep_every == 0:
            continue
        trash = temporary_name(directory)
        os.replace(directory, trash)
        shutil.rmtree(trash, ignore_errors=True)
        deleted.append(step)
    if deleted:
        logger.info("deleted the checkpoints of steps %s", ", ".join(map(str, deleted)))
    return deleted
