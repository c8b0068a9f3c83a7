"""Exemplars of few-shot prompts: a pool of training rows, and who draws which of them.

    pool     the `size` rows of the training source with the smallest hash of (seed, id)
    record   takes those k of the pool with the smallest mixture of
                 hash of (seed, template, record's id)   and   hash of (exemplar's id)
             passing over what it may not show: the row itself, one of its document, one whose prompt reads the same,
             one that the template does not render, one that does not fit

    record's id      order of the pool (e1 ... e5)       with e3 its own document, k = 2
    r7               e4 e3 e1 e5 e2                      e4, e1
    r8               e2 e5 e4 e1 e3                      e2, e5

So a row that joins the pool changes only the records that rank it among their first k, and nothing else that is
rendered, nor its order, changes anything. The draw leaves the variant out: 3shot and 3shot+cot show the same rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_xmtf.prompts.readers.bad_rows import Reject
from megatron_xmtf.prompts.rendering.draws import drawn_number, drawn_numbers, mixed
from megatron_xmtf.prompts.rendering.row_chunks import RowChunk, chunk_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Exemplar", "ExemplarDraw", "ExemplarPool", "build_exemplar_pool"]


@dataclass(frozen=True)
class Exemplar:
    """A row of the pool as one template renders it."""

    inputs: str
    targets: str


@dataclass(frozen=True)
class ExemplarPool:
    """Training rows to draw from, and the room that exemplars have in a prompt."""

    rows: list[RowChunk]
    max_characters: int
    """Of all exemplars of a record, delimiters included."""

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self.rows)

    def identities(self) -> list[tuple[str, str | None]]:
        """Return (id, document) of each row."""
        return [
            (row_id, own.get("document"))
            for chunk in self.rows
            for row_id, own in zip(chunk.ids, chunk.fields, strict=True)
        ]


class ExemplarDraw:
    """Rank a pool for one record after another."""

    def __init__(self, pool: ExemplarPool, *, seed: int) -> None:
        self.seed = seed
        self.identities = pool.identities()
        self._numbers = drawn_numbers(("exemplar",), [row_id for row_id, _ in self.identities])

    def ranked(self, row_id: str, template: str, count: int) -> Iterator[int]:
        """Yield numbers of pool rows, best first; the ranking is sorted only as far as it is asked for.

        Args:    count: how many will probably be asked for.
        """
        import numpy as np

        key = np.uint64(drawn_number(str(self.seed), template, row_id))
        order = mixed(self._numbers ^ key)
        first = min(len(order), 2 * count + 8)
        best = np.argpartition(order, first - 1)[:first] if first < len(order) else np.arange(len(order))
        yield from _sorted(best, order)
        rest = np.ones(len(order), dtype=bool)
        rest[best] = False
        yield from _sorted(np.flatnonzero(rest), order)

    def draw(
        self,
        rendered: list[Exemplar | None],
        *,
        shots: int,
        row_id: str,
        document: str | None,
        template: str,
        inputs: str,
        worded: Callable[[Exemplar], str],
        max_characters: int,
    ) -> list[str]:
        """Draw the exemplars of one record, as texts with their delimiters.

        Args:    rendered: the pool by the record's template; None for rows that it renders nothing of.
                 inputs: the record's own prompt. worded: puts the delimiters around an exemplar.
        """
        drawn: list[str] = []
        room = max_characters
        for number in self.ranked(row_id, template, shots):
            exemplar, (exemplar_id, exemplar_document) = rendered[number], self.identities[number]
            if exemplar is None or exemplar_id == row_id or exemplar.inputs == inputs:
                continue
            if document is not None and exemplar_document == document:
                continue
            text = worded(exemplar)
            if len(text) > room:
                continue
            room -= len(text)
            drawn.append(text)
            if len(drawn) == shots:
                break
        return drawn


def build_exemplar_pool(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    size: int,
    max_characters: int,
    seed: int,
    reject: Reject | None = None,
) -> ExemplarPool:
    """Keep `size` of the rows, those with the smallest hash of seed and id, in the order of the rows.

    Args:    reject: as `chunk_rows`.
    Raises:  BadRowError: a row that cannot be a template's variables, unless `reject` returns.
    """
    # Of two rows with one id and hash the first stays; the row itself is never compared.
    numbered = (
        (-drawn_number(str(seed), "pool", row_id), -number, (row_id, row)) for number, (row_id, row) in enumerate(rows)
    )
    kept = heapq.nlargest(size, numbered, key=lambda entry: entry[:2])
    kept.sort(key=lambda entry: -entry[1])
    return ExemplarPool(list(chunk_rows((entry[2] for entry in kept), reject=reject)), max_characters)


def _sorted(numbers: NDArray[np.intp], order: NDArray[np.uint64]) -> Iterator[int]:
    import numpy as np

    yield from (int(number) for number in numbers[np.lexsort((numbers, order[numbers]))])
