"""Which rows each step reads: a pure function of the batch's sizes, the one place that knows a batch-size ramp.

    global_batch_size 8, ramp from 2 by 2 over 12 rows: three increments, one every 12 / 3 = 4 rows

    step           0    1    2    3    4    5         counted from 0
    rows before    0    2    4    8   14   22
    size           2    2    4    6    8    8         2 + 2 * floor(rows before * 3 / 12), at most 8

A size is decided by the rows read before the step, so a ramp that is interrupted goes on as it would have. Without a
ramp, step n reads the rows from n * global_batch_size.

Source:  Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES` (Megatron-Core, num_microbatches_calculator.py),
         which divides in floating point where this counts in integers.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["StepRows"]


@dataclass(frozen=True)
class StepRows:
    """The sizes of all steps of a run; without a ramp `start`, `increment` and `rampup_rows` are 0.

    Args:    global_batch_size: rows of a step after the ramp. start: rows of the first step. increment: rows by which
             steps grow. rampup_rows: rows over which they do.
    """

    global_batch_size: int
    start: int = 0
    increment: int = 0
    rampup_rows: int = 0

    @property
    def sizes(self) -> range:
        """Every size that a step may have, the smallest first."""
        if not self.rampup_rows:
            return range(self.global_batch_size, self.global_batch_size + 1)
        return range(self.start, self.global_batch_size + 1, self.increment)

    def before(self, step: int) -> int:
        """Return the rows read before `step` (from 0), which is also the number of its first row."""
        phase = _last_not_after(_phases(self), step, "first_step")
        return phase.first_row + (step - phase.first_step) * phase.size

    def of(self, step: int) -> int:
        """Return the rows of `step` (from 0)."""
        return _last_not_after(_phases(self), step, "first_step").size

    def step_of(self, row: int) -> int:
        """Return the step that reads `row`; also the number of whole steps in the first `row` rows."""
        phase = _last_not_after(_phases(self), row, "first_row")
        return phase.first_step + (row - phase.first_row) // phase.size


class _Phase(NamedTuple):
    """Steps of one size: the first of them, and its first row."""

    first_step: int
    first_row: int
    size: int


@lru_cache(maxsize=64)
def _phases(rows: StepRows) -> tuple[_Phase, ...]:
    """Return the phases of a run; the last one, of `global_batch_size`, has no end.

    Increment i ends with the first step that has i + 1 increments before it: the first row r with
    r * increments / rampup_rows >= i + 1, rounded up to a whole number of steps.
    """
    phases: list[_Phase] = []
    step, row, increments = 0, 0, len(rows.sizes) - 1
    while row < rows.rampup_rows:
        done = row * increments // rows.rampup_rows
        size = rows.start + done * rows.increment
        phases.append(_Phase(step, row, size))
        due = -(-(done + 1) * rows.rampup_rows // increments)
        steps = -(-(due - row) // size)
        step, row = step + steps, row + steps * size
    return (*phases, _Phase(step, row, rows.global_batch_size))


def _last_not_after(phases: tuple[_Phase, ...], number: int, field: str) -> _Phase:
    assert number >= 0, f"steps and rows count from 0; this is {number}"
    return phases[bisect_right(phases, number, key=lambda phase: int(getattr(phase, field))) - 1]
