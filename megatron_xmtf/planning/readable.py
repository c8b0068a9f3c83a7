"""Which examples of each dataset a mixture may read, and why it does not read the others.

records     all                                      split, where, exclude  ->  selected
selected    with a target and of a length that fits  ->  fitting            (else empty, dropped)
fitting     in a component of the mixture            ->  available          (else max_examples, pinch, guards)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.mixture import MixtureConfig, MixtureEntry, SelectionConfig
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.build_mixture import build_mixture
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples, fit_examples
from megatron_xmtf.data.selection import select_examples

if TYPE_CHECKING:
    from megatron_xmtf.data.guards import GuardFlags

__all__ = ["ReadableExamples", "find_readable"]


@dataclass(frozen=True)
class ReadableExamples:
    """What can be read of one dataset."""

    fitting: FittingExamples
    """Selected examples that have a target and fit a row."""
    is_selected: NDArray[np.bool_]
    """[examples], whether any entry of the mixture selects it."""
    is_available: NDArray[np.bool_]
    """[examples], whether it can be drawn."""


def find_readable(
    config: RunConfig, datasets: Sequence[ExampleDataset], *, guards: GuardFlags | None = None
) -> list[ReadableExamples]:
    """Find what a run can read of each dataset.

    Args:    datasets: those of `data.training_datasets`, in that order. guards: as `build_packing_index`.
    Raises:  ConfigError, DatasetError: as `build_packing_index`.
    """
    data, sequence_length = config.data, config.batch.sequence_length
    drop = guards.settings.dropped() if guards is not None else ()
    built = build_mixture(
        datasets,
        data.training_mixture,
        sequence_length=sequence_length,
        long_examples=data.long_examples,
        split_seed=data.split_seed,
        excluded=[guards.excluded(number, drop=drop) for number in range(len(datasets))] if guards and drop else None,
    )
    selected = _select(data.training_mixture, datasets, split_seed=data.split_seed)
    found = []
    for number, dataset in enumerate(datasets):
        is_available = np.zeros(len(dataset), np.bool_)
        for component in built.components:
            if component.dataset == number:
                is_available[component.examples.ids] = True
        fitting = fit_examples(
            dataset, sequence_length=sequence_length, long_examples=data.long_examples, chosen=selected[number]
        )
        found.append(ReadableExamples(fitting=fitting, is_selected=selected[number], is_available=is_available))
    return found


def _select(mixture: MixtureConfig, datasets: Sequence[ExampleDataset], *, split_seed: int) -> list[NDArray[np.bool_]]:
    """Return for each dataset [examples] whether an entry, or the pinch, selects it."""
    number_of = {prefix: number for number, prefix in enumerate(mixture.prefixes())}
    selected = [np.zeros(len(dataset), np.bool_) for dataset in datasets]
    for prefix, selections, split in _selections(mixture):
        number = number_of[prefix]
        chosen = select_examples(datasets[number], selections, split=split, split_seed=split_seed)
        selected[number] |= True if chosen is None else chosen
    return selected


def _selections(mixture: MixtureConfig) -> Iterator[tuple[str, list[SelectionConfig], str | None]]:
    """Give each dataset of the tree with all conditions around it, and the nearest split."""

    def walk(
        entries: Sequence[MixtureEntry], around: list[SelectionConfig], split: str | None
    ) -> Iterator[tuple[str, list[SelectionConfig], str | None]]:
        for entry in entries:
            if entry.prefix is not None:
                yield entry.prefix, [*around, entry], entry.split or split
            yield from walk(entry.entries, [*around, entry], entry.split or split)

    yield from walk(mixture.entries, [mixture], mixture.split)
    if mixture.pinch is not None:
        for prefix in mixture.pinch.prefixes:
            yield prefix, [mixture.pinch], mixture.pinch.split or mixture.split
