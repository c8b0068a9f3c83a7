"""Progress bars with rate and ETA for anything that takes more than a few seconds.

On a terminal a bar is drawn on standard error; elsewhere (logs, pipes) a line is printed at most every
30 seconds, so that nothing is silent and no log is flooded.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress"]

LOG_INTERVAL_SECONDS = 30.0


class Progress:
    """Count work done; a context manager.

    with Progress("preprocess", total=1000, unit="records") as progress:
        progress.advance(25)
        progress.note("fill 99.8 %")

    Args:  description: what is being done. total: units of work in all, None when unknown.
           unit: plural noun of what is counted. done: units that an earlier run did; they count for no rate.
           enabled: False draws and prints nothing (ranks other than 0).
    """

    def __init__(
        self, description: str, *, total: int | None, unit: str = "steps", done: int = 0, enabled: bool = True
    ) -> None:
        self.description, self.total, self.unit, self.enabled = description, total, unit, enabled
        self.done = self._done_before = done
        self._note = ""
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            # Imported here: `rich` costs 0.1 s and most uses are not on a terminal.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description:<14}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, rate="", note="")
        return self

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units."""
        self.done += count
        if not self.enabled:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, rate=self._rate())
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            self._print_line()

    def note(self, text: str) -> None:
        """Show `text` behind the bar (a loss, a fill)."""
        self._note = text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, note=text)

    def line(self, text: str) -> None:
        """Print a line of its own on standard output, above the bar where there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{(self.done - self._done_before) / seconds:,.1f} {self.unit}/s"

    def _print_line(self) -> None:
        of_total = f" of {self.total:,}" if self.total is not None else ""
        eta = ""
        done_now = self.done - self._done_before
        if self.total is not None and done_now:
            seconds = (time.monotonic() - self._started) / done_now * (self.total - self.done)
            eta = f", eta {seconds:.0f} s"
        line = f"{self.description}: {self.done:,}{of_total} {self.unit}, {self._rate()}{eta} {self._note}"
        print(line.rstrip(), file=sys.stderr, flush=True)
