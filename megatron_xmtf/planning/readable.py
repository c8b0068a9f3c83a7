"""Which examples of each dataset a mixture may read, and why it does not read the others.

records     all                                      split, where, exclude  ->  selected
selected    with a target and of a length that fits  ->  fitting            (else empty, dropped)
fitting     in a component of the mixture            ->  available          (else max_examples, pinch, guards)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.build_mixture import build_mixture
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples, fit_examples
from megatron_xmtf.data.guards import GuardFlags
from megatron_xmtf.data.selection import selected_by_mixture

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
    data, sequence_length = config.data, config.batch.row_lengths
    drop = guards.settings.dropped() if guards is not None else ()
    built = build_mixture(
        datasets,
        data.training_mixture,
        sequence_length=sequence_length,
        long_examples=data.long_examples,
        split_seed=data.split_seed,
        excluded=[guards.excluded(number, drop=drop) for number in range(len(datasets))] if guards and drop else None,
    )
    selected = selected_by_mixture(datasets, data.training_mixture, split_seed=data.split_seed)
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
