"""Hand signals that ask a job to stop on to its local ranks, once, and bound how long they may take.

    first signal                 sent on to every rank; they save and end, for `grace_seconds` at most
    SIGTERM again, a second on   the ranks are killed at once; checkpoints that have their name are whole

A signal to the process group reaches the ranks twice; they note it once. `timeout` signals a group twice in a moment,
which is not impatience.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType

from megatron_xmtf.errors import StoppedError

__all__ = ["STOP_SIGNALS", "StopForwarding"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: Slurm's and every supervisor's wish; SIGUSR1: Slurm's warning (`--signal=USR1@600`)."""
IMPATIENCE_SECONDS = 1.0


class StopForwarding:
    """Forwards while it is open; outside the main thread, where Python lets nobody take signals, it does nothing.

    Args:  grace_seconds: from the first signal to the end of the ranks.
    """

    def __init__(self, *, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.deadline: float | None = None
        """When the ranks are to be killed, on the monotonic clock; None: no signal has come."""
        self.first: signal.Signals | None = None
        self._first_at = 0.0
        self._processes: list[BaseProcess] = []
        self._interrupts = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopForwarding:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise StoppedError at once in this block, where there is nothing to save.

        Raises:  StoppedError: a signal came, in the block or before.
        """
        self._check()
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False
        self._check()

    @contextmanager
    def starting(self, processes: Sequence[BaseProcess]) -> Iterator[None]:
        """Start `processes` in this block: they get what comes meanwhile as well, and before they can take it.

        The ranks are born with the signals blocked; they are delivered when the rank is ready for them.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
            self._processes = list(processes)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_at, self.deadline = signal.Signals(number), now, now + self.grace_seconds
            for process in self._processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, number)
            if self._interrupts:
                self._check()
        elif number == signal.SIGTERM and now - self._first_at >= IMPATIENCE_SECONDS:
            self.deadline = now

    def _check(self) -> None:
        if self.first is not None:
            raise StoppedError(
                f"stopped by {self.first.name} before the first step; nothing was trained since the last checkpoint, "
                "and the same command goes on."
            )
