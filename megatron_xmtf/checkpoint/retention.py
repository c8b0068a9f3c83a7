"""Remove old checkpoints once a newer one is whole: keep the last few, every n-th, and the best."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_xmtf.checkpoint.directory import list_checkpoints
from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.config.running import KeepBestConfig
from megatron_xmtf.errors import XmtfError
from megatron_xmtf.files import TEMPORARY_MARK, temporary_name

__all__ = ["best_checkpoint", "prune_checkpoints", "reap_left_overs"]

logger = logging.getLogger(__name__)


def prune_checkpoints(
    checkpoints: Path,
    *,
    keep_last: int,
    keep_every: int | None,
    keep_best: KeepBestConfig | None = None,
    in_use: Collection[int] = (),
) -> list[int]:
    """Delete the finished checkpoints that no rule keeps, and what killed writers left; return the deleted steps.

    A checkpoint is renamed before its files go, so that a half-deleted one is never found. What cannot be deleted is
    told and tried again next time; the run goes on, for nothing of it is lost.

    Args:    keep_last: newest ones kept, at least 2. keep_every: steps that are multiples of it are kept; None: none.
             keep_best: keep the best by a validation loss. in_use: steps that somebody still reads.
    """
    assert keep_last >= 2, "the newest checkpoint may be the damaged one"
    reap_left_overs(checkpoints)
    existing = list_checkpoints(checkpoints)
    best = None if keep_best is None else best_checkpoint(existing, keep_best)
    deleted = []
    for step, directory in existing[:-keep_last]:
        if step == best or step in in_use or (keep_every is not None and step % keep_every == 0):
            continue
        trash = temporary_name(directory)
        try:
            os.replace(directory, trash)
        except OSError as error:
            logger.warning("the checkpoint of step %d could not be deleted: %s", step, error)
            continue
        shutil.rmtree(trash, ignore_errors=True)
        deleted.append(step)
    if deleted:
        logger.info("deleted the checkpoints of steps %s", ", ".join(map(str, deleted)))
    return deleted


def best_checkpoint(existing: Collection[tuple[int, Path]], rule: KeepBestConfig) -> int | None:
    """Return the step with the best value of a metric, the newest of equals; None if none has the metric.

    Args:    existing: (step, directory) of finished checkpoints.
    """
    best: tuple[float, int] | None = None
    for step, directory in existing:
        try:
            value = open_manifest(directory).metrics.get(rule.metric)
        except XmtfError as error:
            logger.warning("the checkpoint of step %d is not compared with the others: %s", step, error)
            continue
        if value is None or not math.isfinite(value):
            continue
        rank = (-value if rule.mode == "min" else value, step)
        best = rank if best is None else max(best, rank)
    return None if best is None else best[1]


def reap_left_overs(checkpoints: Path) -> None:
    """Remove what killed writers and broken-off deletions left; nobody may be writing here."""
    for left_over in checkpoints.glob(f"*{TEMPORARY_MARK}*"):
        shutil.rmtree(left_over, ignore_errors=True)
