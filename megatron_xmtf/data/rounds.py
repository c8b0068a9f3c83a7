"""Draw the examples of a component round after round: each round reads all of them once, in a new random order.

    5 examples, draws of 3    round 0: 3 0 4 1 2    round 1: 2 0 1 4 3, of which 1 and 2 must wait
    first draw                         3 0 4
    second draw                              1 2             0
    third draw                                                   4 3    2    1 stands last

A draw of at most all examples never holds one twice, also where it reaches into the next round, and over the run no
example is drawn twice more often than another. Orders are computed where they are needed, not stored: a component may
have hundreds of millions of examples, of which a draw takes a few.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.selection import scramble

__all__ = ["Rounds", "permuted"]

SMALL = 1 << 20
"""Up to here an order is drawn uniformly and kept while its round lasts, 4 bytes an example; beyond it is computed."""
FEISTEL_ROUNDS = 6
BLOCK = 1 << 20
"""Places computed at a time."""


def permuted(places: NDArray[np.integer], size: int, *, seed: int) -> NDArray[np.int64]:
    """Return the elements of a random order of 0..size-1 that stand at some places.

    A Feistel network over the next power of four, walked until the value lies below `size`: a bijection for any seed.

    Source:  Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle-walking).
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> half, values[walking] & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (scramble(right, seed=seed * FEISTEL_ROUNDS + number) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


class Rounds:
    """Draws from one component, in sequence.

    Args:    size: examples of the component. seed: integers that no other component has.
    """

    def __init__(self, size: int, *, seed: tuple[int, ...]) -> None:
        self.size, self.seed = size, seed
        self.drawn = 0
        """Draws so far."""
        self._begin_round(np.zeros(0, np.int64))

    def draw(self, count: int) -> NDArray[np.int64]:
        """Return the next `count` positions, int64, ascending within each round."""
        parts = [np.zeros(0, np.int64)]
        left = count
        while left:
            if self._place == 0 and left >= self.size:
                parts.append(np.arange(self.size, dtype=np.int64))
                self.drawn, left = self.drawn + self.size, left - self.size
                self._begin_round(parts[-1] if left < self.size and count <= self.size else np.zeros(0, np.int64))
                continue
            part = np.sort(self._next(min(left, self.size - self.drawn % self.size)))
            parts.append(part)
            self.drawn, left = self.drawn + len(part), left - len(part)
            if self.drawn % self.size == 0:
                self._begin_round(part if count <= self.size else np.zeros(0, np.int64))
        return np.concatenate(parts)

    def _begin_round(self, just_drawn: NDArray[np.int64]) -> None:
        self._place = 0
        self._waiting = just_drawn
        """Positions of this draw that this round reads last."""
        self._put_off: list[NDArray[np.int64]] = []
        self._order: NDArray[np.uint32] | None = None

    def _next(self, count: int) -> NDArray[np.int64]:
        """Take `count` positions of this round, which has as many left."""
        parts: list[NDArray[np.int64]] = []
        while count and self._place < self.size:
            block = self._ordered(self._place, min(self._place + max(count, 1), self._place + BLOCK, self.size))
            self._place += len(block)
            waits = np.isin(block, self._waiting) if len(self._waiting) else np.zeros(len(block), np.bool_)
            self._put_off.append(block[waits])
            parts.append(block[~waits])
            count -= len(parts[-1])
        if count:
            waiting = np.concatenate(self._put_off)
            parts.append(waiting[:count])
            self._put_off = [waiting[count:]]
        return np.concatenate(parts)

    def _ordered(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return places begin..end-1 of this round's order."""
        number = self.drawn // self.size
        if self.size > SMALL:
            key = int(np.random.default_rng((*self.seed, number)).integers(1 << 48))
            return permuted(np.arange(begin, end), self.size, seed=key)
        if self._order is None:
            random = np.random.default_rng((*self.seed, number))
            self._order = random.permutation(np.arange(self.size, dtype=np.uint32))
        return self._order[begin:end].astype(np.int64)
