"""Stretches of units of one size in words or characters, hashed: n-grams and shingles.

A word weighs 1 / words, a letter of a script without spaces 1 / characters, an ideograph one and a half times that;
the stretch that begins at a unit is the shortest one that weighs 1. Equal wording gives equal stretches wherever it
stands, in mixed text too:

    size 3 words / 6 characters
    the cat sat down        the-cat-sat  cat-sat-down
    吃 了 3 个 苹 果          吃-了-3-个 (3 ideographs are 3/4, a word 1/3)  了-3-个-苹  3-个-苹-果

Why one and a half: in parallel texts 13 English words are 21 characters of Chinese, 31 of Japanese (half of them kana)
and 43 of Thai (SIB-200, MGSM).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.guards.text_units import IDEOGRAPH, LETTER, SYMBOL, WORD, Units, mix, range_hashes

__all__ = ["SHINGLE", "Size", "Stretches", "hash_stretches", "is_in", "pad", "shingles"]

PADDING = 2
"""Boundary units before and after a text in its shingles, so that even a text of one word has some."""
BOUNDARY_HASH = np.uint64(0x5851F42D4C957F2D)


@dataclass(frozen=True)
class Size:
    """How long a stretch is."""

    words: int
    """Units of a script with spaces."""
    characters: int
    """Letters of a script without."""

    def weights(self, kinds: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the weight of each unit; a whole stretch weighs at least `self.weight`."""
        table = np.zeros(256, np.int64)
        table[[SYMBOL, WORD]] = 2 * self.characters
        table[LETTER], table[IDEOGRAPH] = 2 * self.words, 3 * self.words
        return table[kinds]

    @property
    def weight(self) -> int:
        """Weight of a stretch; in whole numbers, a word weighs 2 * characters, a letter 2 * words."""
        return 2 * self.words * self.characters


SHINGLE = Size(words=3, characters=6)
"""Shingles of near duplicates and of template wording: a changed word touches three of them."""


@dataclass(frozen=True)
class Stretches:
    """The stretches of one size in several texts."""

    hashes: NDArray[np.uint64]
    """[stretches]."""
    starts: NDArray[np.int64]
    """[stretches], first unit."""
    ends: NDArray[np.int64]
    """[stretches], one beyond the last unit."""
    texts: NDArray[np.int64]
    """[stretches], ascending: the text that each is in."""


def hash_stretches(units: Units, size: Size, *, limits: NDArray[np.int64] | None = None) -> Stretches:
    """Return every stretch of `size`.

    Args:    limits: [units], stretches from a unit end there at the latest; by default where its text ends.
    """
    count = len(units.hashes)
    texts = np.repeat(np.arange(len(units.offsets) - 1), np.diff(units.offsets))
    if limits is None:
        limits = units.offsets[1:][texts]
    if (units.kinds > WORD).any():
        reached = np.zeros(count + 1, np.int64)
        np.cumsum(size.weights(units.kinds), out=reached[1:])
        ends = np.searchsorted(reached, reached[:-1] + size.weight)
    else:
        ends = np.arange(size.words, count + size.words)
    starts = np.flatnonzero(ends <= limits)
    ends = ends[starts]
    return Stretches(mix(range_hashes(units.hashes, starts, ends)), starts, ends, texts[starts])


def pad(units: Units) -> Units:
    """Put `PADDING` boundary units before and after every text; `codes` and `spans` are not carried over."""
    counts = np.diff(units.offsets)
    texts = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(units.hashes)) + PADDING + 2 * PADDING * texts
    total = len(units.hashes) + 2 * PADDING * len(counts)
    hashes, kinds = np.full(total, BOUNDARY_HASH), np.full(total, WORD, np.uint8)
    hashes[places], kinds[places] = units.hashes, units.kinds
    offsets = units.offsets + 2 * PADDING * np.arange(len(units.offsets))
    return Units(hashes, kinds, offsets, np.empty(0, np.uint32), np.empty((0, 2), np.int64))


def shingles(units: Units) -> Stretches:
    """Return the shingles of padded texts; positions count the padding. A text without units has none."""
    padded = pad(units)
    counts = np.diff(padded.offsets)
    limits = np.repeat(np.where(counts > 2 * PADDING, padded.offsets[1:], 0), counts)
    return hash_stretches(padded, SHINGLE, limits=limits)


def is_in(values: NDArray[np.uint64], ascending: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which values are among `ascending` (sorted, different)."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(ascending, values)
    places[places == len(ascending)] = 0
    return ascending[places] == values
