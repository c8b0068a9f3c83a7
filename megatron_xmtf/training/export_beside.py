"""Write Hugging Face models from finished checkpoints while the run trains on, in a process of rank 0's.

    checkpoint of step 40 published  ->  fork: export_huggingface(step_0000040, OUT/hf/step_0000040)
    step 60 published, 40 still under way  ->  60 waits; if 80 comes before 40 is done, 60 is skipped, with a warning
    end of the run  ->  wait for the last one

The export reads the checkpoint from the disk, never the training's tensors, so it needs no GPU and stops nobody.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.directory import step_directory
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.errors import CheckpointWriteError

__all__ = ["ExportsBeside"]

logger = logging.getLogger(__name__)

LAST_EXPORT_HOURS = 6.0
"""How long the end of a run waits for its last export: 176B parameters at 20 MB/s."""


class ExportsBeside:
    """The exports of one run, on one rank; `directory` is `OUT/hf`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: tuple[int, Path, BaseProcess] | None = None
        self._waiting: tuple[int, Path] | None = None
        self._failed: list[str] = []

    @property
    def in_use(self) -> Collection[int]:
        """Steps whose checkpoints are still read."""
        return [entry[0] for entry in (self._running, self._waiting) if entry is not None]

    def request(self, checkpoint: Path, *, step: int) -> None:
        """Export a checkpoint as soon as no other export runs; returns at once."""
        if self._waiting is not None:
            logger.warning(
                "the checkpoint of step %d is not exported: the export of step %d takes longer than the next two "
                "checkpoints; `xmtf export --checkpoint %s` does it later, if the checkpoint is kept",
                self._waiting[0],
                self._running[0] if self._running else step,
                self._waiting[1],
            )
        self._waiting = (step, checkpoint)
        self.poll()

    def poll(self) -> None:
        """Take note of an export that has ended, and start the one that waits; returns at once."""
        if self._running is not None:
            step, checkpoint, process = self._running
            if process.is_alive():
                return
            self._running = None
            process.join()
            if process.exitcode != 0:
                message = f"the export of step {step} failed; `xmtf export --checkpoint {checkpoint}` says why"
                logger.error("%s", message)
                self._failed.append(message)
        if self._waiting is not None:
            (step, checkpoint), self._waiting = self._waiting, None
            target = step_directory(self._directory, step)
            if target.exists():
                logger.info("%s exists already and is kept", target)
                return
            self._running = (step, checkpoint, _start(checkpoint, target))

    def finish(self) -> None:
        """Wait for all exports.

        Raises:  CheckpointWriteError: one failed, or takes longer than `LAST_EXPORT_HOURS`. The training is complete.
        """
        self.poll()
        while self._running is not None:
            step, _, process = self._running
            process.join(LAST_EXPORT_HOURS * 3600)
            if process.is_alive():
                process.kill()
                raise CheckpointWriteError(f"the export of step {step} took longer than {LAST_EXPORT_HOURS:g} hours.")
            self.poll()
        if self._failed:
            raise CheckpointWriteError(f"the training is complete and saved, but {'; '.join(self._failed)}.")

    def abandon(self) -> None:
        """End what runs; nothing half-written is left under a final name."""
        if self._running is not None:
            self._running[2].kill()
            self._running = None
        self._waiting = None


def _start(checkpoint: Path, target: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_export, args=(checkpoint, target), name="export")
    process.start()
    return process


def _export(checkpoint: Path, target: Path) -> None:
    """Run in the child; leave without the rank's exit handlers."""
    gc.disable()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(5)  # the training comes first
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    code = 1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Its writers have read it back just now: to read all of it again would only slow the training down.
        export_huggingface(checkpoint, target, verify=False)
        code = 0
    except Exception:
        logger.exception("the export of %s failed", checkpoint)
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "an export is a child"
    parent.join()
    os._exit(1)
