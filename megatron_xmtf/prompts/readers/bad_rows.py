"""Tell bad rows, which may be skipped and counted, from damaged files, which never may.

RecordError      the file cannot be read on: damaged, cut off, not what was declared    always raised
BadRowError      one row cannot be read; the next one can                               raised, or counted
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_xmtf.errors import RecordError

__all__ = ["BadRowError", "LocatedRows", "OnBadRow", "Reject", "Row", "RowReport"]

Row = dict[str, Any]
LocatedRows = Generator[tuple[str, Row], None, None]
"""(file and line for messages, row)."""
OnBadRow = Literal["raise", "skip"]


class BadRowError(RecordError):
    """One row that cannot be read. `reason` is a few words that rows with the same fault share."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Reject = Callable[[BadRowError], None]
"""What a reader calls with a bad row; it raises, or returns and the reader goes on with the next row."""


@dataclass
class RowReport:
    """Counts of a reading, filled while it runs: rows read + left out + rejected by the reader = rows in the files."""

    rows: int = 0
    """Rows given out. Of these some may be rejected later, as variables of a template."""
    left_out: int = 0
    """Rows that a filter (`where`) leaves out."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the message of the first such row, with file and line."""

    @property
    def num_rejected(self) -> int:
        """Rows rejected in all."""
        return sum(self.rejected.values())

    def count(self, error: BadRowError) -> None:
        """Count one rejected row."""
        self.rejected[error.reason] = self.rejected.get(error.reason, 0) + 1
        self.examples.setdefault(error.reason, str(error))

    def rejecter(self, on_bad_row: OnBadRow) -> Reject:
        """Return what raises a bad row's error, or counts it."""

        def reject(error: BadRowError) -> None:
            if on_bad_row == "raise":
                raise error
            self.count(error)

        return reject

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rejected = {
            reason: {"rows": count, "first": self.examples[reason]} for reason, count in sorted(self.rejected.items())
        }
        return {"rows": self.rows, "left_out": self.left_out, "rejected": rejected}
