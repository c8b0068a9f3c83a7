"""Pack examples of two lengths into rows of two sides, on counts of each pair of lengths rather than on examples.

    encoder_length 10, decoder_length 4       pairs (inputs, targets)   (6, 1) x 2   (4, 3) x 2   (3, 2) x 1
    an empty row has room (10, 4)   nearest to it that fits: (6, 1)     leaves (4, 3)
                                    nearest to that:         (4, 3)     leaves (0, 0): the row is closed
    twice the same, as there are two of each; then a row of (3, 2) alone     -> rows {(6,1) (4,3)} x 2, {(3,2)}

A row is filled with the pair that is nearest to the room left, measured in parts of each side, each weighted with how
much of that side the examples without a row still ask for. Long inputs with short targets so meet short inputs with
long targets; where one side alone is scarce, it is best fit on that side. The row found is taken as often as there are
examples for it, which exhausts a pair: the work grows with the number of different pairs, not of examples.

Nearness alone closes rows whose targets are full and whose inputs are two thirds full while there are others to choose
from, and is left with short targets to many inputs that no row can use. So a pair is also far if the rooms that it
leaves on the two sides differ other than by what the sides ask: `balance` weighs that. Which weight is best depends on
the lengths; they are tried in turn, on a sample of many examples, until the rows are nearly as few as the bound allows.

Pairs lie on a plane in blocks of `BLOCK_INPUTS` x `BLOCK_TARGETS`; blocks are searched in the order of how near the
nearest pair in them can be, and only until no other can hold a nearer one.
Source:  bin-centric norm-based greedy of Panigrahy et al. 2011 ("Heuristics for vector bin packing"), here on a
         histogram (Krell et al. 2021, arXiv 2107.02027), and balanced; lower bound: L2 of Martello & Toth 1990 a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.best_fit import BLOCK, RowPattern, number_type, place_examples
from megatron_xmtf.errors import DatasetError

__all__ = ["TWO_SIDED_VERSION", "fewest_rows", "pack_two_sided", "two_sided_patterns"]

TWO_SIDED_VERSION = 2
"""Part of the key of two-sided rows: raised by any change that gives other rows for the same lengths and seed."""
BLOCK_INPUTS, BLOCK_TARGETS = 32, 8
BALANCES = 0.5, 1.0, 0.0
"""Weights of the balance of the two sides, in the order in which they are tried."""
NEARLY = 1.01
"""Rows over the bound's at which no further balance is tried."""
SAMPLED = 20_000
"""Examples on which balances are tried; of more, the best one alone packs all."""


def pack_two_sided(
    inputs: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    encoder_length: int,
    decoder_length: int,
    seed: int | Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Pack examples into rows of two sides; rows, order in a row and examples of equal lengths are shuffled by `seed`.

    Args:    inputs, targets: int [examples], tokens of each example on either side, 1..encoder_length and
             1..decoder_length. seed: one or more integers >= 0; the same seed gives the same bytes.
    Returns: (row_offsets int64 [rows + 1], order [examples]), as `pack_lengths`.
    Raises:  DatasetError: a length below 1 or above that of its side.
    """
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    for name, lengths, most in (("inputs", inputs, encoder_length), ("targets", targets, decoder_length)):
        if len(lengths) and (lengths.min() < 1 or lengths.max() > most):
            raise DatasetError(
                f"{name} to pack have {lengths.min()} to {lengths.max()} tokens; a row holds 1 to {most}. "
                "Drop or truncate the others first."
            )
    if not len(inputs):
        return np.zeros(1, np.int64), np.zeros(0, number_type(0))
    width = decoder_length + 1
    counts = np.zeros((encoder_length + 1) * width, np.int64)
    for begin in range(0, len(inputs), BLOCK):
        part = slice(begin, begin + BLOCK)
        counts += np.bincount(inputs[part].astype(np.int64) * width + targets[part], minlength=len(counts))
    present = np.flatnonzero(counts)
    # Pairs are numbered without gaps: 16 bits where they suffice, which numpy sorts by radix.
    number_of = np.zeros(len(counts), np.uint16 if len(present) <= 1 << 16 else np.uint32)
    number_of[present] = np.arange(len(present))
    keys = np.empty(len(inputs), number_of.dtype)
    for begin in range(0, len(inputs), BLOCK):
        part = slice(begin, begin + BLOCK)
        keys[part] = number_of[inputs[part].astype(np.int64) * width + targets[part]]
    patterns = [
        RowPattern(rows, number_of[codes].tolist())
        for rows, codes in two_sided_patterns(counts.reshape(encoder_length + 1, width))
    ]
    return place_examples(keys, num_keys=len(present), patterns=patterns, random=np.random.default_rng(seed))


def two_sided_patterns(counts: NDArray[np.int64], balances: Sequence[float] = BALANCES) -> list[RowPattern]:
    """Decide which pairs of lengths share a row.

    Args:    counts: [encoder_length + 1, decoder_length + 1], examples of each pair; row 0 and column 0 are 0.
             balances: weights to try, at least one; the fewest rows win. The same counts give the same rows.
    Returns: classes of rows; of a pair (inputs, targets) `lengths` holds inputs * (decoder_length + 1) + targets.
             Every example is in exactly one row.
    """
    examples = int(counts.sum())
    sample = counts
    if examples > SAMPLED and len(balances) > 1:
        sample = np.random.default_rng(0).binomial(counts, SAMPLED / examples)
    enough = NEARLY * fewest_rows(sample)
    best, best_balance = _patterns_of(sample, balances[0]), balances[0]
    for balance in balances[1:]:
        if _count_rows(best) <= enough:
            break
        found = _patterns_of(sample, balance)
        if _count_rows(found) < _count_rows(best):
            best, best_balance = found, balance
    return best if sample is counts else _patterns_of(counts, best_balance)


def _count_rows(patterns: list[RowPattern]) -> int:
    return sum(pattern.rows for pattern in patterns)


def _patterns_of(counts: NDArray[np.int64], balance: float) -> list[RowPattern]:
    plane = _Plane(counts, balance)
    encoder_length, decoder_length = counts.shape[0] - 1, counts.shape[1] - 1
    patterns = []
    while plane.left:
        room_inputs, room_targets = encoder_length, decoder_length
        chosen: dict[tuple[int, int], int] = {}
        plane.weigh_sides()
        while (pair := plane.nearest(room_inputs, room_targets)) is not None:
            plane.take(pair, 1)
            chosen[pair] = chosen.get(pair, 0) + 1
            room_inputs, room_targets = room_inputs - pair[0], room_targets - pair[1]
        more = min(int(plane.counts[pair]) // copies for pair, copies in chosen.items())
        if more:
            for pair, copies in chosen.items():
                plane.take(pair, more * copies)
        width = decoder_length + 1
        codes = [inputs * width + targets for (inputs, targets), copies in chosen.items() for _ in range(copies)]
        patterns.append(RowPattern(1 + more, codes))
    return patterns


class _Plane:
    """Examples without a row, by their pair of lengths; finds the pair nearest to the room that a row has left."""

    def __init__(self, counts: NDArray[np.int64], balance: float) -> None:
        self._balance = balance
        self._size = counts.shape[0] - 1, counts.shape[1] - 1
        down, across = -(-counts.shape[0] // BLOCK_INPUTS), -(-counts.shape[1] // BLOCK_TARGETS)
        self.counts = np.zeros((down * BLOCK_INPUTS, across * BLOCK_TARGETS), np.int64)
        self.counts[: counts.shape[0], : counts.shape[1]] = counts
        self._is_present = self.counts > 0
        # Room left on a side in parts of it, by tokens.
        self._inputs, self._targets = (np.arange(size + 1) / size for size in self._size)
        blocks = self._is_present.reshape(down, BLOCK_INPUTS, across, BLOCK_TARGETS).sum(axis=(1, 3))
        self._pairs_in = blocks  # different pairs left in each block
        self._list_blocks()
        self.left = int(counts.sum())
        self._asked = [
            int(counts.sum(axis=1) @ np.arange(counts.shape[0])),
            int(counts.sum(axis=0) @ np.arange(counts.shape[1])),
        ]
        self.weigh_sides()

    def _list_blocks(self) -> None:
        """List the blocks that have a pair left; those emptied later stay in the list until the next time."""
        found = np.nonzero(self._pairs_in)
        self._first_inputs, self._first_targets = found[0] * BLOCK_INPUTS, found[1] * BLOCK_TARGETS
        self._is_left = np.ones(len(found[0]), np.bool_)
        self._place = {pair: at for at, pair in enumerate(zip(found[0].tolist(), found[1].tolist(), strict=True))}
        self._emptied = 0

    def weigh_sides(self) -> None:
        """Weigh each side by what is still asked of it, in rows."""
        inputs, targets = self._asked[0] / self._size[0], self._asked[1] / self._size[1]
        most = max(inputs, targets, 1e-9)
        self._weights = inputs / most, targets / most
        self._ahead = (targets - inputs) / most  # room of the inputs over that of the targets in rows as asked
        self._far_inputs, self._far_targets = (
            weight * parts**2 for weight, parts in zip(self._weights, (self._inputs, self._targets), strict=True)
        )

    def take(self, pair: tuple[int, int], count: int) -> None:
        """Take examples of a pair away."""
        self.counts[pair] -= count
        self.left -= count
        self._asked[0] -= pair[0] * count
        self._asked[1] -= pair[1] * count
        if self.counts[pair] == 0:
            self._is_present[pair] = False
            block = pair[0] // BLOCK_INPUTS, pair[1] // BLOCK_TARGETS
            self._pairs_in[block] -= 1
            if self._pairs_in[block] == 0:
                self._is_left[self._place[block]] = False
                self._emptied += 1
                if self._emptied > len(self._is_left) // 4:
                    self._list_blocks()

    def nearest(self, room_inputs: int, room_targets: int) -> tuple[int, int] | None:
        """Return the pair nearest to the room among those that fit it; None if none fits."""
        if room_inputs < 1 or room_targets < 1:
            return None
        short_inputs = room_inputs - self._first_inputs
        short_targets = room_targets - self._first_targets
        possible = np.flatnonzero((short_inputs >= 0) & (short_targets >= 0) & self._is_left)
        bounds = self._bounds(short_inputs[possible], short_targets[possible])
        best, best_pair = np.inf, None
        while len(bounds):
            at = int(bounds.argmin())
            if bounds[at] >= best:
                break
            bounds[at] = np.inf
            block = int(possible[at])
            distance, pair = self._nearest_in(block, room_inputs, room_targets)
            if distance < best:
                best, best_pair = distance, pair
        return best_pair

    def _bounds(self, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return distances below which no pair of each block is.

        Args:    inputs, targets: [blocks], room that the smallest pair of a block leaves, in tokens.
        """
        least_inputs, least_targets = (
            np.maximum(inputs - (BLOCK_INPUTS - 1), 0),
            np.maximum(targets - (BLOCK_TARGETS - 1), 0),
        )
        bounds: NDArray[np.float64] = self._far_inputs[least_inputs] + self._far_targets[least_targets]
        if self._balance:
            below = self._inputs[least_inputs] - self._targets[targets] - self._ahead
            above = self._targets[least_targets] - self._inputs[inputs] + self._ahead
            imbalance = np.maximum(np.maximum(below, above), 0)
            bounds += self._balance * imbalance**2
        return bounds

    def _nearest_in(self, block: int, room_inputs: int, room_targets: int) -> tuple[float, tuple[int, int]]:
        """Return the distance, squared, of the nearest pair of a block, and the pair; infinity if none fits."""
        first_inputs, first_targets = int(self._first_inputs[block]), int(self._first_targets[block])
        end_inputs = min(first_inputs + BLOCK_INPUTS, room_inputs + 1)
        end_targets = min(first_targets + BLOCK_TARGETS, room_targets + 1)
        # A column of the inputs' part, a row of the targets'; room falls as lengths grow.
        column = slice(room_inputs - end_inputs + 1, room_inputs - first_inputs + 1)
        row = slice(room_targets - end_targets + 1, room_targets - first_targets + 1)
        distances = self._far_inputs[column][::-1, None] + self._far_targets[row][::-1]
        if self._balance:
            imbalance = self._inputs[column][::-1, None] - self._targets[row][::-1] - self._ahead
            distances += self._balance * imbalance**2
        present = self._is_present[first_inputs:end_inputs, first_targets:end_targets]
        distances = np.where(present, distances, np.inf)
        inputs, targets = divmod(int(distances.argmin()), distances.shape[1])
        return float(distances[inputs, targets]), (first_inputs + inputs, first_targets + targets)


def fewest_rows(counts: NDArray[np.int64]) -> int:
    """Return a number of rows below which no packing of these pairs can go.

    On each side alone, for every k up to half its length: lengths above length - k need a row each, those from k on
    count as they are, shorter ones not at all; k = 0 is the sum of the lengths over the length of a side.

    Args:    counts: [encoder_length + 1, decoder_length + 1], examples of each pair.
    """
    return max(_fewest_of_side(counts.sum(axis=1)), _fewest_of_side(counts.sum(axis=0)))


def _fewest_of_side(counts: NDArray[np.int64]) -> int:
    length = len(counts) - 1
    examples, tokens = np.zeros(length + 2, np.int64), np.zeros(length + 2, np.int64)
    np.cumsum(counts, out=examples[1:])
    np.cumsum(counts * np.arange(length + 1), out=tokens[1:])
    small = np.arange(length // 2 + 1)
    large = examples[-1] - examples[length - small + 1]
    between = tokens[length - small + 1] - tokens[small]
    return int((large - (-between // length)).max())
