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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.errors import DatasetError

__all__ = [
    "ALGORITHM_VERSION",
    "RowPattern",
    "best_fit_patterns",
    "gather",
    "group",
    "number_type",
    "pack_lengths",
    "place_examples",
]

ALGORITHM_VERSION = 2
"""Part of every packing key: raised by any change that gives other rows for the same lengths and seed."""

BLOCK = 1 << 19
"""Examples or segments handled at once: what is read and written at random then fits the cache (4 MB)."""

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
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Pack examples into rows by best fit; rows, order in a row and equal lengths are shuffled by `seed`.

    Time is linear in the examples, and memory beside the result is 6 bytes each where `lengths` has 16 bits: all
    that is large is written from front to back, in blocks whose random accesses stay in the processor's cache.

    Args:    lengths: int [examples], tokens of each example, 1..capacity. capacity: tokens of a row
             (sequence_length + 1). seed: one or more integers >= 0; the same seed gives the same bytes.
    Returns: (row_offsets int64 [rows + 1], order [examples] of `number_type`): row r holds the examples
             order[row_offsets[r]:row_offsets[r + 1]]. Every example is in exactly one row.
    Raises:  DatasetError: a length below 1 or above `capacity` (choose what happens to those first).
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return np.zeros(1, np.int64), np.zeros(0, number_type(0))
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > capacity:
        raise DatasetError(
            f"lengths to pack run from {shortest} to {longest}; a row holds 1 to {capacity} tokens. "
            "Drop or truncate the others first."
        )
    # 16 bits where they suffice: numpy sorts those by radix, in linear time.
    lengths = lengths.astype(np.uint16 if capacity <= np.iinfo(np.uint16).max else np.int32, copy=False)
    counts = np.zeros(capacity + 1, np.int64)
    for begin in range(0, lengths.size, BLOCK):
        counts += np.bincount(lengths[begin : begin + BLOCK], minlength=capacity + 1)
    patterns = best_fit_patterns(counts, capacity=capacity)
    return place_examples(lengths, num_keys=capacity + 1, patterns=patterns, random=np.random.default_rng(seed))


def place_examples(
    keys: NDArray[np.integer], *, num_keys: int, patterns: Sequence[RowPattern], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Give every example a place in a row of its class, all in random order.

    Args:    keys: int [examples], what tells examples apart for the packer, 0..num_keys-1: their length, or the number
             of their pair of lengths. patterns: classes of rows; `lengths` of them are keys, as many as there are.
    Returns: as `pack_lengths`.
    """
    examples, ends = group(keys, num_keys=num_keys)
    counts = np.diff(ends, prepend=0)
    layout = _Layout(patterns, keys.dtype, random)
    for begin, end in zip((ends - counts).tolist(), ends.tolist(), strict=True):
        random.shuffle(examples[begin:end])
    order = np.empty_like(examples)
    taken = ends - counts  # of each key, where its first example without a place stands
    for begin, slot_keys in layout.slots(random):
        slots, places = _deal(slot_keys, taken)
        order[begin : begin + len(slots)][slots] = examples[places]
    return layout.row_offsets, order


def number_type(count: int) -> type[np.uint32] | type[np.int64]:
    """Return the type in which 0..count-1 are kept: 32 bits up to 4.29 billion of them, else 64."""
    return np.uint32 if count <= 1 << 32 else np.int64


def gather(values: NDArray[Any], numbers: NDArray[np.integer]) -> NDArray[Any]:
    """Return values[numbers] by blocks: numpy itself would first make a 64-bit copy of all of 32-bit `numbers`."""
    result = np.empty(len(numbers), values.dtype)
    for begin in range(0, len(numbers), BLOCK):
        result[begin : begin + BLOCK] = values[numbers[begin : begin + BLOCK]]
    return result


def group(
    keys: NDArray[np.integer], *, num_keys: int, values: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Bring values of equal keys together, each key's in their order: a counting sort by blocks.

        keys 1 0 1 1    values 5 6 7 8    ->  grouped 6 5 7 8, ends 1 4

    Args:    keys: int [n], 0..num_keys-1; 16-bit ones are sorted in linear time. values: [n]; None: 0..n-1.
    Returns: (grouped [n], ends int64 [num_keys]): key k has grouped[ends[k - 1]:ends[k]].
    """
    counts = np.zeros(num_keys, np.int64)
    for begin in range(0, keys.size, BLOCK):
        counts += np.bincount(keys[begin : begin + BLOCK], minlength=num_keys)
    ends = np.cumsum(counts)
    free = ends - counts
    grouped = np.empty(keys.size, number_type(keys.size) if values is None else values.dtype)
    for begin in range(0, keys.size, BLOCK):
        found, places = _deal(keys[begin : begin + BLOCK], free)
        grouped[places] = found + begin if values is None else values[begin : begin + BLOCK][found]
    return grouped, ends


def _deal(keys: NDArray[np.integer], free: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Deal the keys of a block their next places, and move `free` on behind them.

        keys 5 3 5, free[3] = 40, free[5] = 70  ->  positions 1 0 2, places 40 70 71; free[3] = 41, free[5] = 72

    Returns: (positions in the block ordered by key, place of each), [block].
    """
    positions = np.argsort(keys, kind="stable")
    counts = np.bincount(keys, minlength=len(free))
    before = np.cumsum(counts) - counts
    places = np.repeat(free - before, counts)
    places += np.arange(len(keys))
    free += counts
    return positions, places


class _Layout:
    """Rows in training order: which class each is of, and where its segments stand.

    row_offsets: int64 [rows + 1].
    """

    def __init__(self, patterns: Sequence[RowPattern], length_type: np.dtype[Any], random: np.random.Generator) -> None:
        self._patterns = np.repeat(
            np.arange(len(patterns), dtype=np.uint32), np.array([pattern.rows for pattern in patterns])
        )
        random.shuffle(self._patterns)
        self._contents = np.array([length for pattern in patterns for length in pattern.lengths], length_type)
        self._widths = np.array([len(pattern.lengths) for pattern in patterns])
        self._starts = np.cumsum(self._widths) - self._widths  # of each pattern in `contents`
        self.row_offsets = np.zeros(len(self._patterns) + 1, np.int64)
        np.cumsum(gather(self._widths, self._patterns), out=self.row_offsets[1:])

    def slots(self, random: np.random.Generator) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """Yield the lengths of all segments, block by block: (first segment, lengths in random order in each row)."""
        step = max(1, BLOCK * (len(self.row_offsets) - 1) // int(self.row_offsets[-1]))
        for first in range(0, len(self._patterns), step):
            patterns = self._patterns[first : first + step]
            begin = int(self.row_offsets[first])
            starts = self.row_offsets[first : first + len(patterns)] - begin
            lengths = np.empty(int(self.row_offsets[first + len(patterns)]) - begin, self._contents.dtype)
            widths = self._widths[patterns]
            for width in np.unique(widths).tolist():
                rows = np.flatnonzero(widths == width)
                columns = np.arange(width)
                block = self._contents[self._starts[patterns[rows]][:, None] + columns]  # [rows, segments]
                lengths[starts[rows][:, None] + columns] = random.permuted(block, axis=1, out=block)
            yield begin, lengths
