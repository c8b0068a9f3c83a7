"""Build the packing index of a run: mixture and lengths in, rows in training order out.

    datasets --select, fit-->         components with their shares       build_mixture.py, shares.py
             --pass by pass-->        examples drawn                     mixture.py
             --best fit-->            rows, until there are enough       best_fit.py

A pass is packed by itself and follows the one before it, so a longer run has the rows of a shorter one first.
The index is stored under its key, the hash of everything that changes it: a run never reads rows of other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.mixture import MixtureConfig, MixtureEntry
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths, row_capacity, word_lengths
from megatron_xmtf.config.schema import DataConfig, DatasetConfig, RunConfig
from megatron_xmtf.data.best_fit import gather, number_type, pack_lengths
from megatron_xmtf.data.build_mixture import build_mixture
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples, LongExamples, fit_examples, require_examples
from megatron_xmtf.data.mixture import Mixture, MixtureDraws
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.packing_key import packing_key
from megatron_xmtf.data.packing_statistics import (
    component_statistics,
    dataset_statistics,
    fewest_rows_of,
    packing_statistics,
)
from megatron_xmtf.data.selection import select_examples
from megatron_xmtf.data.two_sided_fit import pack_two_sided
from megatron_xmtf.errors import ConfigError, DatasetError
from megatron_xmtf.progress import Progress

if TYPE_CHECKING:
    from megatron_xmtf.data.guards import GuardFlags

__all__ = [
    "build_packing_index",
    "index_directory",
    "index_path",
    "open_packing_index",
    "pack_dataset",
    "pack_mixture",
    "packing_key",
]

PACKING_STREAM = 2
"""Keeps the random numbers of packing apart from those of the mixture, which start from the same seed."""
BLOCK = 1 << 20
"""Segments counted at a time."""


def index_directory(config: RunConfig) -> Path:
    """Return where the packing indexes of a run are kept: `data.index_directory`, or `packing` in its output."""
    return Path(config.data.index_directory or Path(config.output) / "packing")


def index_path(directory: Path | str, key: str) -> Path:
    """Return the directory of the index with this key; 16 of its 64 digits name it."""
    return Path(directory) / key[:16]


def open_packing_index(
    datasets: Sequence[ExampleDataset],
    *,
    data: DataConfig,
    sequence_length: RowLengths,
    rows_needed: int,
    seed: int,
    directory: Path | str,
    guards: GuardFlags | None = None,
    verify: bool = True,
) -> PackingIndex:
    """Open the index that `build_packing_index` made for the same arguments.

    Args:    verify: compare every hash; once a run is enough.
    Raises:  DatasetError: there is none, or it is damaged.
    """
    key, _ = packing_key(
        datasets,
        mixture=data.training_mixture,
        split_seed=data.split_seed,
        sequence_length=sequence_length,
        long_examples=data.long_examples,
        seed=seed,
        rows_needed=rows_needed,
        guards=guards,
    )
    path = index_path(directory, key)
    if not path.exists():
        raise DatasetError(
            f"there is no packing index {path} for this data, rows of {word_lengths(sequence_length)}, seed={seed} and "
            f"{rows_needed} rows; run `xmtf pack CONFIG` with the same configuration."
        )
    return PackingIndex.load(path, key=key, verify=verify)


def build_packing_index(
    datasets: Sequence[ExampleDataset],
    *,
    data: DataConfig,
    sequence_length: RowLengths,
    rows_needed: int,
    seed: int,
    directory: Path | str,
    guards: GuardFlags | None = None,
    verify: bool = True,
) -> PackingIndex:
    """Open the index of a run, building and storing it if it is not there.

    Any number of processes may build at once: the first to finish is kept, and all open that one.

    Args:    datasets: those of `data.training_datasets`, in its order. rows_needed: rows of the whole run.
             directory: where indexes are kept; this one is in a directory named by its key.
             guards: examples found to be duplicates or contaminated; what `data.guards` drops is not read.
    Raises:  DatasetError: no example fits a row, an example is too long under `long_examples: error`, the mixture
             runs out under its `max_epochs`, or the stored index is damaged. DiskFullError: no space.
    """
    key, _ = packing_key(
        datasets,
        mixture=data.training_mixture,
        split_seed=data.split_seed,
        sequence_length=sequence_length,
        long_examples=data.long_examples,
        seed=seed,
        rows_needed=rows_needed,
        guards=guards,
    )
    path = index_path(directory, key)
    if not path.exists():
        index = pack_mixture(
            datasets,
            mixture=data.training_mixture,
            split_seed=data.split_seed,
            sequence_length=sequence_length,
            long_examples=data.long_examples,
            rows_needed=rows_needed,
            seed=seed,
            guards=guards,
        )
        index.save(path)
    return PackingIndex.load(path, key=key, verify=verify)


def pack_mixture(
    datasets: Sequence[ExampleDataset],
    *,
    mixture: MixtureConfig | None = None,
    split_seed: int = 0,
    sequence_length: RowLengths,
    long_examples: LongExamples = "drop",
    rows_needed: int | None = None,
    seed: int = 0,
    guards: GuardFlags | None = None,
) -> PackingIndex:
    """Pack pass after pass over a mixture until there are `rows_needed` rows; None: one pass, whole.

    Args:    datasets: those of `mixture.prefixes()`. mixture: None reads every example once a pass.
    Raises:  DatasetError, ConfigError: as `build_packing_index`.
    """
    if mixture is None:
        mixture = MixtureConfig(entries=[MixtureEntry(prefix=str(one.prefix), name=one.name) for one in datasets])
    if len(datasets) > np.iinfo(np.uint16).max:
        raise ConfigError(f"{len(datasets)} datasets in one mixture; at most 65535 can be indexed. Merge some.")
    key, key_inputs = packing_key(
        datasets,
        mixture=mixture,
        split_seed=split_seed,
        sequence_length=sequence_length,
        long_examples=long_examples,
        seed=seed,
        rows_needed=rows_needed,
        guards=guards,
    )
    drop = guards.settings.dropped() if guards is not None else ()
    built = build_mixture(
        datasets,
        mixture,
        sequence_length=sequence_length,
        long_examples=long_examples,
        split_seed=split_seed,
        excluded=[guards.excluded(number, drop=drop) for number in range(len(datasets))] if guards and drop else None,
    )
    rows = _Rows(built, datasets, row_lengths=sequence_length)
    draws = MixtureDraws(built, capacity=row_capacity(sequence_length), seed=seed)
    with Progress("pack", total=rows_needed or 1, unit="rows") as progress:
        while rows.count < (rows_needed or 1):
            chosen = draws.next_pass()
            if chosen is None:
                raise _exhausted(built, draws, rows.count, rows_needed)
            progress.advance(rows.pack(chosen, seed=(seed, PACKING_STREAM, rows.passes)))
    return rows.index(rows_needed, long_examples=long_examples, key=key, key_inputs=key_inputs)


def _exhausted(mixture: Mixture, draws: MixtureDraws, rows: int, rows_needed: int | None) -> DatasetError:
    limits = sorted({one.max_epochs for one in mixture.components if one.max_epochs is not None})
    return DatasetError(
        f"the mixture is used up after {rows:,} rows ({sum(draws.drawn):,} examples), and the run needs "
        f"{rows_needed:,}: max_epochs ({', '.join(f'{limit:g}' for limit in limits)}) allows no more draws. Shorten "
        "the schedule, raise max_epochs, or add data."
    )


class _Rows:
    """Rows packed so far; an example is known by its component and its number until the end."""

    def __init__(self, mixture: Mixture, datasets: Sequence[ExampleDataset], *, row_lengths: RowLengths) -> None:
        self.mixture, self.datasets, self.row_lengths = mixture, datasets, row_lengths
        self.count = self.passes = 0
        self._segments = 0
        self._offsets: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._components: list[NDArray[np.integer]] = []
        self._examples: list[NDArray[np.integer]] = []

    def pack(self, chosen: Sequence[NDArray[np.integer]], *, seed: tuple[int, ...]) -> int:
        """Pack one pass; return the number of its rows."""
        parts = [one.examples for one in self.mixture.components]
        row_offsets, order = self._best_fit(parts, chosen, seed=seed)
        id_type = number_type(max(len(dataset) for dataset in self.datasets))
        examples = np.concatenate(
            [gather(part.ids, at).astype(id_type, copy=False) for part, at in zip(parts, chosen, strict=True)]
        )
        self._examples.append(gather(examples, order))
        del examples
        component_type = np.min_scalar_type(max(len(parts) - 1, np.iinfo(np.uint8).max + 1))
        components = np.repeat(np.arange(len(parts), dtype=component_type), [len(at) for at in chosen])
        self._components.append(gather(components, order))
        self._offsets.append(row_offsets[1:] + self._segments)
        self._segments += len(order)
        self.passes += 1
        self.count += len(row_offsets) - 1
        return len(row_offsets) - 1

    def _best_fit(
        self, parts: Sequence[FittingExamples], chosen: Sequence[NDArray[np.integer]], *, seed: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """Pack the lengths of a pass; return `pack_lengths`'s row offsets and order."""
        lengths = np.concatenate([gather(part.lengths, at) for part, at in zip(parts, chosen, strict=True)])
        if not isinstance(self.row_lengths, EncoderDecoderLengths):
            return pack_lengths(lengths, capacity=row_capacity(self.row_lengths), seed=seed)
        targets = np.concatenate([gather(part.target_tokens, at) for part, at in zip(parts, chosen, strict=True)])
        lengths -= targets
        return pack_two_sided(
            lengths,
            targets,
            encoder_length=self.row_lengths.encoder_length,
            decoder_length=self.row_lengths.decoder_length,
            seed=seed,
        )

    def index(
        self, rows_needed: int | None, *, long_examples: str, key: str, key_inputs: dict[str, Any]
    ) -> PackingIndex:
        """Return the index of the first `rows_needed` rows, or of all."""
        offsets = _joined(self._offsets)[: None if rows_needed is None else rows_needed + 1]
        components = _joined(self._components)[: offsets[-1]]
        example_ids = _joined(self._examples)[: offsets[-1]]
        dataset_of = np.array([one.dataset for one in self.mixture.components], np.uint16)
        dataset_ids = gather(dataset_of, components)
        statistics = packing_statistics(
            dataset_statistics(
                self.datasets,
                self.mixture.available(len(self.datasets)),
                self.mixture.left_out,
                dataset_ids,
                example_ids,
                row_lengths=self.row_lengths,
            ),
            self._component_statistics(components, example_ids),
            rows=len(offsets) - 1,
            epochs=self.passes,
            row_lengths=self.row_lengths,
            fewest_rows=fewest_rows_of(self.datasets, dataset_ids, example_ids, row_lengths=self.row_lengths),
        )
        return PackingIndex(
            row_offsets=offsets,
            dataset_ids=dataset_ids,
            example_ids=example_ids,
            row_lengths=self.row_lengths,
            long_examples=long_examples,
            statistics=statistics,
            key=key,
            key_inputs=key_inputs,
        )

    def _component_statistics(self, components: NDArray[np.integer], example_ids: NDArray[np.integer]) -> list[Any]:
        counts = np.zeros(len(self.mixture.components), np.int64)
        for begin in range(0, len(components), BLOCK):
            counts += np.bincount(components[begin : begin + BLOCK], minlength=len(counts))
        sizes = [count * one.unit_size for count, one in zip(counts.tolist(), self.mixture.components, strict=True)]
        return component_statistics(self.mixture, self.datasets, counts.tolist(), sizes)


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Concatenate and empty the list, without a copy when there is one part."""
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    parts.clear()
    return whole


def pack_dataset(
    dataset: ExampleDataset,
    *,
    entry: DatasetConfig | None = None,
    split_seed: int = 0,
    sequence_length: RowLengths,
    long_examples: LongExamples = "drop",
    rows: int | None = None,
) -> PackingIndex:
    """Pack the examples of one dataset in their own order, without any randomness: for validation loss.

    A row is closed when the next example does not fit.

    Args:    entry: says which examples are read (`split`, `where`, `exclude`); None: all.
             rows: rows wanted at most (the first examples); None: all examples.
    Raises:  DatasetError: no example fits a row, or one is too long under `error`.
    """
    entry = entry or DatasetConfig(prefix=str(dataset.prefix), name=dataset.name)
    mixture = MixtureConfig(entries=[MixtureEntry(**entry.model_dump())])
    key, key_inputs = packing_key(
        [dataset],
        mixture=mixture,
        split_seed=split_seed,
        sequence_length=sequence_length,
        long_examples=long_examples,
        seed=0,
        rows_needed=rows,
    )
    chosen = select_examples(dataset, [entry], split=entry.split, split_seed=split_seed)
    fitting = fit_examples(dataset, sequence_length=sequence_length, long_examples=long_examples, chosen=chosen)
    require_examples(dataset, fitting, sequence_length=sequence_length)
    offsets = _next_fit(fitting, sequence_length, rows)
    drawn = fitting.ids[: offsets[-1]]
    dataset_ids = np.zeros(len(drawn), np.uint16)
    each = dataset_statistics(
        [dataset], [len(fitting)], [fitting.left_out], dataset_ids, drawn, row_lengths=sequence_length
    )
    return PackingIndex(
        row_offsets=np.array(offsets, np.int64),
        dataset_ids=dataset_ids,
        example_ids=drawn,
        row_lengths=sequence_length,
        long_examples=long_examples,
        statistics=packing_statistics(each, [], rows=len(offsets) - 1, epochs=1, row_lengths=sequence_length),
        key=key,
        key_inputs=key_inputs,
    )


def _next_fit(fitting: FittingExamples, row_lengths: RowLengths, rows: int | None) -> list[int]:
    """Return the row offsets of examples in their order: a row ends where the next example does not fit a side."""
    if isinstance(row_lengths, EncoderDecoderLengths):
        targets = fitting.target_tokens.astype(np.int64)
        sides = [
            (np.cumsum(fitting.lengths - targets), row_lengths.encoder_length),
            (np.cumsum(targets), row_lengths.decoder_length),
        ]
    else:
        sides = [(np.cumsum(fitting.lengths, dtype=np.int64), row_capacity(row_lengths))]
    offsets = [0]
    while offsets[-1] < len(fitting) and (rows is None or len(offsets) <= rows):
        begin = offsets[-1]
        used = [int(ends[begin - 1]) if begin else 0 for ends, _ in sides]
        found = [
            int(np.searchsorted(ends, before + room, side="right"))
            for (ends, room), before in zip(sides, used, strict=True)
        ]
        offsets.append(min(found))
    return offsets
