"""Stop at the next good moment after Ctrl-C, SIGTERM or SIGHUP, and say so with the right exit code."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from megatron_xmtf.errors import ExitCode, XmtfError

__all__ = ["StopSignals", "StoppedError"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(XmtfError):
    """A run that was stopped by a signal; `exit_code` says whether the same command goes on from there."""

    exit_code = ExitCode.FAILED


class StopSignals:
    """Turn the first signal into a `StoppedError` where nothing is torn by it, the second into KeyboardInterrupt.

    with StopSignals() as signals:
        prepare()                    # a signal raises at once
        for chunk in chunks:
            write(chunk)             # from the first `check` on a signal waits ...
            signals.check()          # ... for this moment

    A signal that the process was told to ignore (nohup) stays ignored. Outside the main thread nothing is installed.
    """

    def __init__(self) -> None:
        self._caught: signal.Signals | None = None
        self._deferring = False
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

    def defer(self) -> None:
        """Let signals wait for `check` from now on."""
        self._deferring = True

    def check(self) -> None:
        """Raise StoppedError if a signal came."""
        self._deferring = True
        if self._caught is not None:
            raise StoppedError(f"stopped by {self._caught.name}.")

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is not None:
            raise KeyboardInterrupt
        self._caught = signal.Signals(number)
        if not self._deferring:
            self.check()
