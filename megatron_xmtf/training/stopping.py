"""Stop well: signals, a stop file and the end of the time, as one decision that all ranks take at a step boundary.

    SIGTERM, SIGUSR1   to any rank, all, or the local launcher    checkpoint, exit code 3: start the same command again
    time limit         `stop.time_limit_minutes`, Slurm's end     checkpoint, exit code 3
    stop file          `OUT/stop`                                 checkpoint, exit code 0: nobody starts it again

What a rank knows travels as a number in the all-reduce (MAX) over all ranks that every step has anyway: 8 bytes more.
It is sent before a step's update, so all ranks finish that step, save and end together. What comes later, during the
update, a validation or a save, is obeyed one step later; a rank never stops alone in the middle of a collective.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

from megatron_xmtf.config.running import StopConfig
from megatron_xmtf.errors import ExitCode
from megatron_xmtf.parallel.stop_forwarding import STOP_SIGNALS

__all__ = ["STOP_FILE", "StopCause", "StopRequests", "stop_time"]

STOP_FILE = "stop"
"""Name in the run directory; whoever may write there can stop the run, on any machine."""


class StopCause(IntEnum):
    """Why a run stops; where ranks know of several, the largest is the one that is told."""

    NONE = 0
    STOP_FILE = 1
    TIME_LIMIT = 2
    SIGUSR1 = 3
    SIGTERM = 4

    @property
    def exit_code(self) -> ExitCode:
        """What the process ends with after its checkpoint: a person's stop file is no reason to start again."""
        return ExitCode.DONE if self in (StopCause.NONE, StopCause.STOP_FILE) else ExitCode.REQUEUE

    @property
    def words(self) -> str:
        """For messages."""
        return {"STOP_FILE": f"the file `{STOP_FILE}` in the run directory", "TIME_LIMIT": "the time limit"}.get(
            self.name, self.name
        )


def stop_time(config: StopConfig, *, started: float, environment: Mapping[str, str]) -> float | None:
    """Return the moment, in Unix seconds, from which the run is to stop; None: it has no limit.

    started 1000, time_limit_minutes 10                                     -> 1600
    SLURM_JOB_END_TIME 2000, slurm_margin_minutes 10                        -> 1400
    both                                                                    -> 1400, the earlier one
    """
    moments = []
    if config.time_limit_minutes is not None:
        moments.append(started + 60 * config.time_limit_minutes)
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        moments.append(int(end) - 60 * config.slurm_margin_minutes)
    return min(moments, default=None)


class StopRequests:
    """What one rank knows of reasons to stop; a context manager that notes signals while it is open.

    with StopRequests(config.stop, output=output, started=started, reads_file=rank == 0) as requests:
        requests.now()    -> StopCause.NONE ... StopCause.SIGTERM

    A signal is noted and otherwise without effect, however often it comes. Outside the main thread none is noted.

    Args:  reads_file: whether this rank looks for the stop file, one look a step. started: Unix seconds.
    """

    def __init__(self, config: StopConfig, *, output: Path, started: float, reads_file: bool) -> None:
        self._file = output / STOP_FILE if reads_file else None
        self._stop_time = stop_time(config, started=started, environment=os.environ)
        self._signalled = StopCause.NONE
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._note)
            # The local launcher forks its ranks with these blocked: one that came since is delivered now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def now(self) -> StopCause:
        """Return the weightiest reason that this rank knows."""
        if self._signalled:
            return self._signalled
        if self._stop_time is not None and time.time() >= self._stop_time:
            return StopCause.TIME_LIMIT
        if self._file is not None and self._file.exists():
            return StopCause.STOP_FILE
        return StopCause.NONE

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, StopCause[signal.Signals(number).name])
