"""Traces of a window of steps by `torch.profiler`, for chrome://tracing and https://ui.perfetto.dev.

logging.profile: {start: 10, steps: 3}    OUT/profile/steps_10-12_rank_0.json
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_xmtf.config.schema import ProfileConfig
from megatron_xmtf.files import disk_errors, temporary_name

__all__ = ["StepProfiler"]

logger = logging.getLogger(__name__)


class StepProfiler:
    """Traces this rank's part of the window, where there is one to trace.

    Args:  config: the window, None for no trace. directory: where traces are written. rank: of this process.
           resumed_step: steps done already; a window that they cover in part or in full is traced from there on.
    """

    def __init__(self, config: ProfileConfig | None, *, directory: Path, rank: int, resumed_step: int) -> None:
        self._directory, self._rank = directory, rank
        self._profile: profile | None = None
        is_traced = config is not None and (rank == 0 or config.ranks == "all")
        self._first = max(config.start, resumed_step + 1) if config is not None and is_traced else 0
        self._last = config.start + config.steps - 1 if config is not None and is_traced else -1
        if is_traced and self._first > self._last:
            logger.warning(
                "logging.profile: steps up to %d are done already, nothing is left of the window that ends at %d",
                resumed_step,
                self._last,
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace the step that the block runs, if it is in the window; the last one writes the trace."""
        if not self._first <= step <= self._last:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        if step == self._last:
            self._write(self._profile)

    def _write(self, finished: profile) -> None:
        finished.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"steps_{self._first}-{self._last}_rank_{self._rank}.json"
        # torch writes a plain file for every name that does not end with .gz.
        unfinished = temporary_name(path)
        with disk_errors(path):
            finished.export_chrome_trace(str(unfinished))
            os.replace(unfinished, path)
        logger.info("steps %d to %d are traced in %s", self._first, self._last, path)
