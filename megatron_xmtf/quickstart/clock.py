"""Time the stages of the quickstart and tell the user where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["StageClock"]


class StageClock:
    """Print a line for each stage with its time budget, and one with the seconds that it took.

    with clock.stage("pretrain", "580 steps at DP2"):
        ...

    Args:  budgets: stage -> seconds allowed, in order; a stage over its budget is marked, not stopped.
    """

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self.budgets = dict(budgets)
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Time a block of work as stage `name`; `what` is one short sentence for the user."""
        number = list(self.budgets).index(name) + 1
        budget = self.budgets[name]
        print(f"\n[{number:2d}/{len(self.budgets)}] {name}: {what} (budget {budget} s)", flush=True)
        started = time.monotonic()
        yield
        used = self.seconds[name] = time.monotonic() - started
        over = "  OVER BUDGET" if used > budget else ""
        print(f"        {used:.1f} of {budget} s, {self.total_seconds:.0f} s since the start{over}", flush=True)

    @property
    def total_seconds(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._started
