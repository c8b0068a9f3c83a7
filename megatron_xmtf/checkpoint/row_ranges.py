"""Cut tensors into ranges of rows of bounded size: what a conversion reads, changes and writes at a time."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["CHUNK_BYTES", "row_ranges"]

CHUNK_BYTES = 32 << 20
"""Largest chunk: what a conversion holds at once, some times over, in each of its processes."""


def row_ranges(rows: int, row_bytes: int, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Cut `rows` rows into consecutive ranges [start, end) of at most `chunk_bytes`, at least one row each.

    >>> list(row_ranges(5, 10, chunk_bytes=25))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, chunk_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
