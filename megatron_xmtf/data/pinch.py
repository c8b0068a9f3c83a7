"""A pinch of multilinguality: a few examples of each further language, no document in two languages.

    languages  ar cs et ... (11)   examples: 40   ->   4 4 4 4 4 4 4 3 3 3 3, each of documents that no other has taken

The documents drawn are then left out of the rest of the mixture, so 40 of 4,640 parallel examples leave 4,600 English
ones: the total stays, and no document is read in two languages.
Source:  Shaham et al. 2024 (arXiv 2401.01854), section 4: P = 1 % is 40 of 4,640 examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.mixture import PinchConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples
from megatron_xmtf.data.selection import scramble
from megatron_xmtf.data.shares import share_counts
from megatron_xmtf.errors import ConfigError, DatasetError

__all__ = ["Pool", "draw_pinch", "require_documents"]


@dataclass(frozen=True)
class Pool:
    """Examples that a pinch may draw from."""

    number: int
    """Position of the dataset in the mixture."""
    dataset: ExampleDataset
    examples: FittingExamples


def require_documents(dataset: ExampleDataset) -> NDArray[np.uint64]:
    """Return the document of each example, uint64 [examples].

    Raises:  DatasetError: the dataset does not say.
    """
    documents = dataset.documents
    if documents is None:
        raise DatasetError(
            f"dataset {dataset.name!r} ({dataset.prefix}) does not say which document an example is of, and a pinch "
            "needs that, so that no document is read in two languages. Preprocess its records again, with a field id "
            "or document."
        )
    return np.asarray(documents)


def draw_pinch(pinch: PinchConfig, pools: Sequence[Pool], *, seed: int) -> Iterator[tuple[str, int, FittingExamples]]:
    """Draw one example of each of some documents, language by language; yields (language, dataset, examples).

    Raises:  ConfigError: a language has too few documents that are still free. DatasetError: no document numbers.
    """
    languages = pinch.languages or sorted({name for pool in pools for name in pool.dataset.names("language")} - {""})
    if not languages:
        raise ConfigError("pinch: its datasets name no language; give the records a field language.")
    if pinch.examples_per_language is not None:
        wanted = [pinch.examples_per_language] * len(languages)
    else:
        assert pinch.examples is not None, "the schema asks for one of the two counts"
        wanted = share_counts(pinch.examples, [1.0] * len(languages))
    taken = np.zeros(0, np.uint64)
    for number, (language, count) in enumerate(zip(languages, wanted, strict=True), 1):
        drawn = _draw_language(pools, language, taken, count, seed=seed + number)
        for pool, examples in drawn:
            yield language, pool.number, examples
        taken = np.concatenate([taken, *(require_documents(pool.dataset)[examples.ids] for pool, examples in drawn)])


def _draw_language(
    pools: Sequence[Pool], language: str, taken: NDArray[np.uint64], count: int, *, seed: int
) -> list[tuple[Pool, FittingExamples]]:
    """Draw `count` documents of one language from all pools together, and the first example of each."""
    documents, owners, positions = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, pool in enumerate(pools):
        names, codes = pool.dataset.names("language"), pool.dataset.column("language")
        if codes is None or language not in names:
            continue
        inside = np.flatnonzero(codes[pool.examples.ids] == names.index(language))
        documents.append(require_documents(pool.dataset)[pool.examples.ids[inside]])
        owners.append(np.full(len(inside), number))
        positions.append(inside)
    document, owner, position = np.concatenate(documents), np.concatenate(owners), np.concatenate(positions)
    by_place = np.argsort(scramble(document, seed=seed), kind="stable")
    _, first = np.unique(document[by_place], return_index=True)
    once = by_place[np.sort(first)]
    free = once[~np.isin(document[once], taken)]
    if len(free) < count:
        raise ConfigError(
            f"pinch: {count} documents of language {language!r} are wanted, {len(free)} are there that no other "
            "language has taken; lower `examples`, or give more data."
        )
    chosen = np.zeros(len(document), np.bool_)
    chosen[free[:count]] = True
    return [
        (pool, pool.examples.only(here))
        for number, pool in enumerate(pools)
        if len(here := position[chosen & (owner == number)])
    ]
