"""Pack lengths into rows by best fit, on counts of each length rather than on single examples.

    capacity 10, lengths 7 7 6 4 3 3 2          counts {7: 2, 6: 1, 4: 1, 3: 2, 2: 1}
    longest first, each into the fullest row that still holds it:
        7 7    two rows with 3 free              6    one row with 4 free
        4      into the row with 4 free          3 3  into the two rows with 3 free
        2      nothing has room: a new row       -> rows {7 3} {7 3} {6 4} {2}

Equal lengths take equal decisions, so a whole class of rows is filled by one decision: the work grows with the number
of different lengths, not with the number of examples, and the rows are those of best-fit decreasing example by example.
Source:  best-fit packing of documents, Ding et al. 2024 (arXiv 2404.10830); packing by histogram, Krell et al. 2021
         (arXiv 2107.02027).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.errors import DatasetError

__all__ = ["ALGORITHM_VERSION", "RowPattern", "best_fit_patterns", "pack_lengths"]

ALGORITHM_VERSION = 1
"""Part of every packing key: raised by any change that gives other rows for the same lengths and seed."""

BLOCK_SLOTS = 1 << 22
"""Slots whose order is drawn at once: bounds temporary memory to about 40 bytes x this, 160 MB."""

_Chain = tuple["_Chain", int, int] | None
"""What is in a row: (what was in it before, length, copies), so that classes of rows share their beginnings."""


class RowPattern(NamedTuple):
    """A class of rows that hold the same lengths."""

    rows: int
    """Rows of this class."""
    lengths: list[int]
    """Tokens of each segment, longest first; their sum is at most the capacity."""


def best_fit_patterns(counts: Sequence[int] | NDArray[np.int64], *, capacity: int) -> list[RowPattern]:
    """Decide by best-fit decreasing which lengths share a row.

    Args:    counts: [capacity + 1], number of examples of each length; counts[0] is 0. capacity: tokens of a row.
    Returns: classes of rows; every example is in exactly one row.
    """
    classes: dict[int, list[tuple[int, _Chain]]] = defaultdict(list)  # free tokens -> [(rows, contents)]
    spaces: list[int] = []  # sorted keys of `classes`
    full: list[tuple[int, _Chain]] = []

    def keep(space: int, rows: int, contents: _Chain) -> None:
        if space == 0:
            full.append((rows, contents))
            return
        if not classes[space]:
            insort(spaces, space)
        classes[space].append((rows, contents))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            position = bisect_left(spaces, length)
            if position == len(spaces):
                space, rows, contents = capacity, -(-left // (capacity // length)), None
            else:
                space = spaces[position]
                rows, contents = classes[space].pop()
                if not classes[space]:
                    spaces.pop(position)
            # A row that took one of this length is now the fullest with room for the next: it takes all it can.
            copies = space // length
            filled = min(rows, left // copies)
            if filled:
                keep(space - copies * length, filled, (contents, length, copies))
            left, rows = left - filled * copies, rows - filled
            if rows and left:
                keep(space - left * length, 1, (contents, length, left))
                left, rows = 0, rows - 1
            if rows:
                keep(space, rows, contents)
    remaining = [group for space in spaces for group in classes[space]]
    return [RowPattern(rows, _unchain(contents)) for rows, contents in full + remaining]


def _unchain(contents: _Chain) -> list[int]:
    lengths: list[list[int]] = []
    while contents is not None:
        contents, length, copies = contents
        lengths.append([length] * copies)
    return [length for run in reversed(lengths) for length in run]


def pack_lengths(
    lengths: NDArray[np.integer], *, capacity: int, seed: int | Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack examples into rows by best fit; rows, order in a row and equal lengths are shuffled by `seed`.

    Args:    lengths: int [examples], tokens of each example, 1..capacity. capacity: tokens of a row
             (sequence_length + 1). seed: one or more integers >= 0; the same seed gives the same bytes.
    Returns: (row_offsets int64 [rows + 1], order int64 [examples]): row r holds the examples
             order[row_offsets[r]:row_offsets[r + 1]]. Every example is in exactly one row.
    Raises:  DatasetError: a length below 1 or above `capacity` (choose what happens to those first).
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > capacity:
        raise DatasetError(
            f"lengths to pack run from {shortest} to {longest}; a row holds 1 to {capacity} tokens. "
            "Drop or truncate the others first."
        )
    # 16 bits where they suffice: numpy sorts those by radix, in linear time.
    slot_type = np.uint16 if capacity <= np.iinfo(np.uint16).max else np.int32
    lengths = lengths.astype(slot_type)
    random = np.random.default_rng(seed)
    patterns = best_fit_patterns(np.bincount(lengths, minlength=capacity + 1), capacity=capacity)
    row_offsets, slot_lengths = _lay_out(patterns, lengths.size, slot_type, random)
    examples_by_length = np.argsort(lengths, kind="stable")
    class_ends = np.cumsum(np.bincount(lengths, minlength=capacity + 1))
    for begin, end in _spans(class_ends):
        random.shuffle(examples_by_length[begin:end])
    order = np.empty(lengths.size, np.int64)
    order[np.argsort(slot_lengths, kind="stable")] = examples_by_length
    return row_offsets, order


def _spans(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of every length class that has two examples or more."""
    begin = 0
    for end in ends.tolist():
        if end - begin > 1:
            yield begin, end
        begin = end


def _lay_out(
    patterns: Sequence[RowPattern], num_examples: int, slot_type: type[np.integer], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Give every row a place in the training order, and every slot of it a length.

    Returns: (row_offsets int64 [rows + 1], slot_lengths [examples]).
    """
    rows = np.array([pattern.rows for pattern in patterns])
    segments = np.repeat([len(pattern.lengths) for pattern in patterns], rows)
    place = random.permutation(segments.size)
    row_offsets = np.zeros(segments.size + 1, np.int64)
    row_offsets[1:][place] = segments
    np.cumsum(row_offsets, out=row_offsets)
    slot_lengths = np.empty(num_examples, slot_type)
    begin = 0
    for pattern in patterns:
        width, mixed = len(pattern.lengths), pattern.lengths[0] != pattern.lengths[-1]
        contents = np.array(pattern.lengths, slot_type)
        slots = np.arange(width)
        step = max(1, BLOCK_SLOTS // width)
        for first in range(begin, begin + pattern.rows, step):
            starts = row_offsets[place[first : min(first + step, begin + pattern.rows)]]
            block = np.broadcast_to(contents, (starts.size, width))  # [rows, segments]
            slot_lengths[starts[:, None] + slots] = random.permuted(block, axis=1) if mixed else block
        begin += pattern.rows
    return row_offsets, slot_lengths
