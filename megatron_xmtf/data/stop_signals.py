"""Stop at the next good moment after Ctrl-C, SIGTERM or SIGHUP, and say so with the right exit code."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from types import FrameType, TracebackType

from megatron_xmtf.errors import ExitCode, XmtfError

__all__ = ["StopSignals", "StoppedError"]

IMPATIENCE_SECONDS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(XmtfError):
    """A run that was stopped by a signal; `exit_code` says whether the same command goes on from there."""

    exit_code = ExitCode.FAILED


class StopSignals:
    """Turn a signal into a `StoppedError`, where nothing is torn by it.

    with StopSignals() as signals:
        for chunk in chunks:
            write(chunk)             # a signal waits ...
            signals.check()          # ... for this moment: an error while workers start would leave them behind

    Until then more signals change nothing (`timeout` sends two), but Ctrl-C again, `IMPATIENCE_SECONDS` later, kills
    the worker processes and raises KeyboardInterrupt. A signal that the process was told to ignore (nohup) stays
    ignored. Outside the main thread nothing is installed.
    """

    def __init__(self) -> None:
        self._caught: signal.Signals | None = None
        self._caught_at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    @property
    def error(self) -> StoppedError | None:
        """What `check` would raise."""
        return None if self._caught is None else StoppedError(f"stopped by {self._caught.name}.")

    def check(self) -> None:
        """Raise StoppedError if a signal came."""
        if error := self.error:
            raise error

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is None:
            self._caught, self._caught_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._caught_at >= IMPATIENCE_SECONDS:
            for child in multiprocessing.active_children():
                child.kill()
            raise KeyboardInterrupt
