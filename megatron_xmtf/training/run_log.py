"""What a run tells its users, on rank 0 alone: metrics.jsonl, trackers, printed lines, a progress bar with its ETA."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.parallel.topology import Topology
from megatron_xmtf.progress import Progress
from megatron_xmtf.training.metrics import MetricsFile, printed_line, validation_line
from megatron_xmtf.training.prepare import PreparedRun
from megatron_xmtf.training.trackers import Tracker, open_trackers

__all__ = ["RunLog"]

logger = logging.getLogger(__name__)


class RunLog:
    """Takes the metrics of every step; silent on every rank but the first. A context manager, entered by all ranks."""

    def __init__(self, prepared: PreparedRun, topology: Topology) -> None:
        self.prepared, self.topology, self.config = prepared, topology, prepared.config
        self.is_open = topology.rank == 0
        self._trackers: list[Tracker] = []
        self._progress = Progress(
            "train",
            total=self.config.train_steps,
            unit="steps",
            done=prepared.start.step,
            enabled=self.is_open,
        )
        self._started = time.monotonic()

    def __enter__(self) -> RunLog:
        self._open_trackers()
        if self.is_open:
            self._print_start()
        self._progress.__enter__()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def step(self, metrics: Mapping[str, Any], *, validation: Mapping[str, float]) -> None:
        """Record a finished step.

        Args:    metrics: as `metrics.py` lists them. validation: losses measured after it; empty: not measured.
        """
        if not self.is_open:
            return
        for tracker in self._trackers:
            tracker.record({**metrics, **validation})
        step = int(metrics["step"])
        self._progress.advance()
        self._progress.note(f"loss {metrics['loss']:.4f}")
        if step % self.config.logging.log_interval == 0:
            eta = self._eta_seconds(step)
            self._progress.line(printed_line(metrics, train_steps=self.config.train_steps, eta_seconds=eta))
        if validation:
            self._progress.line(validation_line(step, validation))

    def _eta_seconds(self, step: int) -> float:
        """Return the time to the last step at the mean pace so far, validation and checkpoints included."""
        # In rows: steps of a batch-size ramp are shorter.
        rows = self.config.batch.step_rows
        done = rows.before(step) - rows.before(self.prepared.start.step)
        return (time.monotonic() - self._started) / done * (self.config.train_rows - rows.before(step))

    def _open_trackers(self) -> None:
        """Open on rank 0 what is written to; all ranks raise its error together, for none may wait for it."""
        message: list[str | None] = [None]
        if self.is_open:
            resumed_step = self.prepared.start.step
            try:
                # metrics.jsonl comes last: nothing of it is cut off for a run that cannot start.
                self._trackers = open_trackers(self.config, resumed_step=resumed_step)
                path = Path(self.config.output) / "metrics.jsonl"
                self._trackers.append(MetricsFile(path, resumed_step=resumed_step))
            except ConfigError as error:
                message = [str(error)]
        torch.distributed.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise ConfigError(message[0])

    def _print_start(self) -> None:
        start, config = self.prepared.start, self.config
        verb = f"resumed at step {start.step} from" if start.resumed else "starts from"
        logger.info(
            "training to step %d on %s in %s, %s %s",
            config.train_steps,
            self.topology,
            config.precision,
            verb,
            start.checkpoint,
        )
