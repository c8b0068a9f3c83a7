"""Keep the records of each template with the smallest hash, up to a number, without holding the records.

    cap 2, keys in the order of the rows      50  20  70  10  60
    kept so far (threshold)                   50  50  50  20  20      -> the records with 20 and 10
                                                  20  20  10  10

Before that, the ids alone may be read, to know how large the cap-th smallest key will be at most: then no row above it
is rendered at all. Where too many of
those rows come to nothing, the template is tried again without a bound.

    cap 2, spare 1, all keys  10 20 50 60 70      -> 50; 70 and 60 are never rendered

A key mixes the hash of (seed, id) and the hash of the template's name, so that each template keeps rows of its own. A
row above the threshold need not be rendered. The threshold that a chunk is judged by is the one after the chunk
`MAX_CHUNKS_UNDER_WAY` before it: so it does not depend on how far other processes are, and neither do the counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from megatron_xmtf.prompts.rendering.draws import drawn_numbers, mixed
from megatron_xmtf.prompts.rendering.render_processes import MAX_CHUNKS_UNDER_WAY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RecordCap", "smallest_keys"]

IDS_AT_ONCE = 10_000


class RecordCap:
    """Thresholds of a rendering's templates, chunk by chunk."""

    def __init__(
        self, cap: int, names: Sequence[str], *, seed: int, upper_bounds: NDArray[np.uint64] | None = None
    ) -> None:
        """Args: upper_bounds: of each template, the largest key that is rendered (`smallest_keys`); None: no bound."""
        import numpy as np

        self.cap, self.seed = cap, seed
        self._names = drawn_numbers(("cap",), list(names))
        self._kept: list[NDArray[np.uint64]] = [np.empty(0, np.uint64) for _ in names]
        self._thresholds: list[NDArray[np.uint64]] = []
        """After each chunk that is merged, that of each template."""
        no_bounds = np.full(len(names), np.iinfo(np.uint64).max, np.uint64)
        self._bounds = no_bounds if upper_bounds is None else upper_bounds
        self._current = self._bounds.copy()

    def keys(self, ids: list[str]) -> NDArray[np.uint64]:
        """Return the keys of a chunk's rows, uint64 [rows, templates]."""
        return mixed(drawn_numbers((str(self.seed), "cap"), ids)[:, None] ^ self._names[None, :])

    def rows_to_render(self, chunk_number: int, keys: NDArray[np.uint64]) -> list[list[int] | None] | None:
        """Return for each template the rows of a chunk that may still be kept; None: all."""
        import numpy as np

        merged = chunk_number - MAX_CHUNKS_UNDER_WAY
        candidates = keys <= (self._thresholds[merged] if merged >= 0 else self._bounds)[None, :]
        return [None if column.all() else np.flatnonzero(column).tolist() for column in candidates.T]

    def merge(self, rendered: Sequence[tuple[int, int]], keys: NDArray[np.uint64]) -> list[bool]:
        """Take the records of the next chunk; tell of each whether it may still be kept.

        Args:    rendered: (number of the row, number of the template) of each record.
        """
        import numpy as np

        places = np.array(rendered, np.int64).reshape(-1, 2)
        found = keys[places[:, 0], places[:, 1]]
        for number in np.unique(places[:, 1]):
            kept = np.concatenate((self._kept[number], found[places[:, 1] == number]))
            kept = kept[kept <= self._current[number]]
            if len(kept) > 2 * self.cap:
                kept = np.partition(kept, self.cap - 1)[: self.cap]
                self._current[number] = kept.max()
            self._kept[number] = kept
        self._thresholds.append(self._current.copy())
        allowed: list[bool] = (found <= self._current[places[:, 1]]).tolist()
        return allowed

    def widened_bounds(self) -> NDArray[np.uint64] | None:
        """Return bounds without those of templates that found fewer records than the cap; None: there are none."""
        import numpy as np

        unbounded = np.uint64(np.iinfo(np.uint64).max)
        short = np.array([len(kept) < self.cap for kept in self._kept]) & (self._bounds < unbounded)
        return np.where(short, unbounded, self._bounds) if short.any() else None

    def final_thresholds(self) -> list[int]:
        """Return for each template the largest key that is kept."""
        import numpy as np

        return [
            # Of a list that was cut to the cap and has not grown since, the largest key stands in `_current`.
            int(np.partition(kept, self.cap - 1)[self.cap - 1] if len(kept) > self.cap else current)
            for kept, current in zip(self._kept, self._current, strict=True)
        ]


def smallest_keys(ids: Iterable[str], *, count: int, names: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """Return for each template the `count`-th smallest key of all rows, as the bounds of a `RecordCap`.

    Of fewer rows than that, the bound is the largest number: there is nothing to leave out.
    """
    import numpy as np

    cap = RecordCap(1, names, seed=seed)
    smallest = np.empty((0, len(names)), np.uint64)
    rows = 0
    stream = iter(ids)
    while batch := list(islice(stream, max(count, IDS_AT_ONCE))):
        rows += len(batch)
        smallest = np.concatenate((smallest, cap.keys(batch)))
        if len(smallest) > count:
            smallest = np.partition(smallest, count - 1, axis=0)[:count]
    if rows <= count:
        return np.full(len(names), np.iinfo(np.uint64).max, np.uint64)
    bounds: NDArray[np.uint64] = smallest.max(axis=0)
    return bounds
