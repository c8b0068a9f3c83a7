"""Build the packing index of a run: mixture and lengths in, rows in training order out.

    datasets --lengths, policy for long ones--> examples that fit
             --mixture, epoch by epoch-->       examples drawn
             --best fit-->                      rows, until there are enough for the run

An epoch is packed by itself and follows the one before it, so a longer run has the rows of a shorter one first.
The index is stored under its key, the hash of everything that changes it: a run never reads rows of other data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.schema import DataConfig, RunConfig
from megatron_xmtf.data.best_fit import ALGORITHM_VERSION, pack_lengths
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples, LongExamples, fit_examples, require_examples
from megatron_xmtf.data.mixture import epoch_examples
from megatron_xmtf.data.packing_index import DatasetStatistics, PackingIndex, PackingStatistics
from megatron_xmtf.errors import DatasetError
from megatron_xmtf.files import sha256_json
from megatron_xmtf.progress import Progress

__all__ = [
    "LongExamples",
    "PackingIndex",
    "build_packing_index",
    "index_directory",
    "index_path",
    "mixture_weights",
    "open_packing_index",
    "pack_dataset",
    "pack_lengths",
    "pack_mixture",
    "packing_key",
]

PACKING_STREAM = 2
"""Keeps the random numbers of packing apart from those of the mixture, which start from the same seed."""


def index_directory(config: RunConfig) -> Path:
    """Return where the packing indexes of a run are kept: `data.index_directory`, or `packing` in its output."""
    return Path(config.data.index_directory or Path(config.output) / "packing")


def mixture_weights(data: DataConfig) -> list[float] | None:
    """Return the weight of each training dataset, None where all examples are read (the schema wants all or none)."""
    return [entry.weight for entry in data.train if entry.weight is not None] or None


def packing_key(
    datasets: Sequence[ExampleDataset],
    *,
    weights: Sequence[float] | None,
    sequence_length: int,
    long_examples: LongExamples,
    seed: int,
    rows_needed: int,
) -> tuple[str, dict[str, Any]]:
    """Hash everything that changes a packing index.

    Returns: (SHA-256 in hexadecimal, what was hashed). A dataset counts by its manifest's content, or without
             one by its sizes; never by its path, so that moved data keep their index.
    """
    inputs = {
        "algorithm_version": ALGORITHM_VERSION,
        "datasets": [
            {"name": dataset.name, "kind": dataset.kind, "sha256": _dataset_hash(dataset)} for dataset in datasets
        ],
        "weights": None if weights is None else [float(weight) for weight in weights],
        "sequence_length": sequence_length,
        "long_examples": long_examples,
        "seed": seed,
        "rows_needed": rows_needed,
    }
    return sha256_json(inputs), inputs


def _dataset_hash(dataset: ExampleDataset) -> str:
    if dataset.manifest is not None:
        return sha256_json(dataset.manifest)
    digest = hashlib.sha256()
    for lengths in (dataset.input_lengths, dataset.target_lengths):
        digest.update(lengths.astype(np.int64).tobytes())
    return digest.hexdigest()


def index_path(directory: Path | str, key: str) -> Path:
    """Return the directory of the index with this key; 16 of its 64 digits name it."""
    return Path(directory) / key[:16]


def _key_of_run(
    datasets: Sequence[ExampleDataset], *, data: DataConfig, sequence_length: int, rows_needed: int, seed: int
) -> str:
    """Return the key under which a run's index is kept."""
    key, _ = packing_key(
        datasets,
        weights=mixture_weights(data),
        sequence_length=sequence_length,
        long_examples=data.long_examples,
        seed=seed,
        rows_needed=rows_needed,
    )
    return key


def open_packing_index(
    datasets: Sequence[ExampleDataset],
    *,
    data: DataConfig,
    sequence_length: int,
    rows_needed: int,
    seed: int,
    directory: Path | str,
) -> PackingIndex:
    """Open the index that `build_packing_index` made for the same arguments.

    Raises:  DatasetError: there is none, or it is damaged.
    """
    key = _key_of_run(datasets, data=data, sequence_length=sequence_length, rows_needed=rows_needed, seed=seed)
    path = index_path(directory, key)
    if not path.exists():
        raise DatasetError(
            f"there is no packing index {path} for this data, sequence_length={sequence_length}, seed={seed} and "
            f"{rows_needed} rows; run `xmtf pack CONFIG` with the same configuration."
        )
    return PackingIndex.load(path, key=key)


def build_packing_index(
    datasets: Sequence[ExampleDataset],
    *,
    data: DataConfig,
    sequence_length: int,
    rows_needed: int,
    seed: int,
    directory: Path | str,
) -> PackingIndex:
    """Open the index of a run, building and storing it if it is not there.

    Any number of processes may build at once: the first to finish is kept, and all open that one.

    Args:    datasets: those of `data.train`, in its order. rows_needed: rows of the whole run.
             directory: where indexes are kept; this one is in a directory named by its key.
    Raises:  DatasetError: no example fits a row, an example is too long under `long_examples: error`, or the
             stored index is damaged. DiskFullError: no space.
    """
    assert len(data.train) == len(datasets), f"{len(data.train)} entries in data.train, {len(datasets)} datasets"
    key = _key_of_run(datasets, data=data, sequence_length=sequence_length, rows_needed=rows_needed, seed=seed)
    path = index_path(directory, key)
    if not path.exists():
        index = pack_mixture(
            datasets,
            weights=mixture_weights(data),
            sequence_length=sequence_length,
            long_examples=data.long_examples,
            rows_needed=rows_needed,
            seed=seed,
        )
        index.save(path)
    return PackingIndex.load(path, key=key)


def pack_mixture(
    datasets: Sequence[ExampleDataset],
    *,
    weights: Sequence[float] | None = None,
    sequence_length: int,
    long_examples: LongExamples = "drop",
    rows_needed: int = 1,
    seed: int = 0,
) -> PackingIndex:
    """Pack epoch after epoch of a mixture until there are `rows_needed` rows; rows beyond that are kept.

    Raises:  DatasetError: as `build_packing_index`.
    """
    key, key_inputs = packing_key(
        datasets,
        weights=weights,
        sequence_length=sequence_length,
        long_examples=long_examples,
        seed=seed,
        rows_needed=rows_needed,
    )
    fitting = [
        fit_examples(dataset, sequence_length=sequence_length, long_examples=long_examples) for dataset in datasets
    ]
    require_examples(datasets, fitting, weights=weights, sequence_length=sequence_length)
    sizes = [len(examples.ids) for examples in fitting]
    drawn = [np.zeros(size, np.int64) for size in sizes]  # times that each example is in the index
    offsets, dataset_parts, example_parts = [np.zeros(1, np.int64)], [], []
    rows = segments = epoch = 0
    with Progress("pack", total=rows_needed, unit="rows") as progress:
        while rows < rows_needed:
            chosen = epoch_examples(sizes, weights=weights, seed=seed, epoch=epoch)
            row_offsets, dataset_ids, example_ids = _pack_epoch(
                fitting, chosen, capacity=sequence_length + 1, seed=(seed, PACKING_STREAM, epoch)
            )
            for times, positions in zip(drawn, chosen, strict=True):
                times += np.bincount(positions, minlength=len(times))
            offsets.append(row_offsets[1:] + segments)
            dataset_parts.append(dataset_ids)
            example_parts.append(example_ids)
            rows, segments, epoch = rows + len(row_offsets) - 1, segments + len(example_ids), epoch + 1
            progress.advance(len(row_offsets) - 1)
    return PackingIndex(
        row_offsets=np.concatenate(offsets),
        dataset_ids=np.concatenate(dataset_parts),
        example_ids=np.concatenate(example_parts),
        sequence_length=sequence_length,
        long_examples=long_examples,
        statistics=_statistics(datasets, fitting, drawn, rows=rows, epochs=epoch, capacity=sequence_length + 1),
        key=key,
        key_inputs=key_inputs,
    )


def _pack_epoch(
    fitting: Sequence[FittingExamples], chosen: Sequence[NDArray[np.int64]], *, capacity: int, seed: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.uint16], NDArray[np.int64]]:
    """Pack one epoch. Returns (row_offsets [rows + 1], dataset_ids [segments], example_ids [segments])."""
    lengths = np.concatenate([examples.lengths[at] for examples, at in zip(fitting, chosen, strict=True)])
    row_offsets, order = pack_lengths(lengths, capacity=capacity, seed=seed)
    dataset_ids = np.repeat(np.arange(len(chosen), dtype=np.uint16), [len(positions) for positions in chosen])
    example_ids = np.concatenate([examples.ids[at] for examples, at in zip(fitting, chosen, strict=True)])
    return row_offsets, dataset_ids[order], example_ids[order]


def pack_dataset(
    dataset: ExampleDataset,
    *,
    sequence_length: int,
    long_examples: LongExamples = "drop",
    rows: int | None = None,
) -> PackingIndex:
    """Pack the examples of one dataset in their own order, without any randomness: for validation loss.

    A row is closed when the next example does not fit.

    Args:    rows: rows wanted at most (the first examples); None: all examples.
    Raises:  DatasetError: no example fits a row, or one is too long under `error`.
    """
    key, key_inputs = packing_key(
        [dataset], weights=None, sequence_length=sequence_length, long_examples=long_examples, seed=0, rows_needed=0
    )
    fitting = fit_examples(dataset, sequence_length=sequence_length, long_examples=long_examples)
    require_examples([dataset], [fitting], weights=None, sequence_length=sequence_length)
    ends = np.cumsum(fitting.lengths, dtype=np.int64)
    offsets = [0]
    while offsets[-1] < len(ends) and (rows is None or len(offsets) <= rows):
        begin = offsets[-1]
        used = int(ends[begin - 1]) if begin else 0
        offsets.append(int(np.searchsorted(ends, used + sequence_length + 1, side="right")))
    count = offsets[-1]
    drawn = (np.arange(len(ends)) < count).astype(np.int64)
    statistics = _statistics(
        [dataset], [fitting], [drawn], rows=len(offsets) - 1, epochs=1, capacity=sequence_length + 1
    )
    return PackingIndex(
        row_offsets=np.array(offsets, np.int64),
        dataset_ids=np.zeros(count, np.uint16),
        example_ids=fitting.ids[:count],
        sequence_length=sequence_length,
        long_examples=long_examples,
        statistics=statistics,
        key=key,
        key_inputs=key_inputs,
    )


def _statistics(
    datasets: Sequence[ExampleDataset],
    fitting: Sequence[FittingExamples],
    drawn: Sequence[NDArray[np.int64]],
    *,
    rows: int,
    epochs: int,
    capacity: int,
) -> PackingStatistics:
    each: list[DatasetStatistics] = [
        {
            "name": dataset.name,
            "examples": int(times.sum()),
            "repeats": int(times.sum() - np.count_nonzero(times)),
            "epochs": float(times.mean()) if len(times) else 0.0,
            "tokens": int(times @ examples.lengths),
            "target_tokens": int(times @ examples.target_tokens),
            "dropped": examples.dropped,
            "truncated": examples.truncated,
            "empty": examples.empty,
        }
        for dataset, examples, times in zip(datasets, fitting, drawn, strict=True)
    ]
    tokens = sum(entry["tokens"] for entry in each)
    return {
        "rows": rows,
        "examples": sum(entry["examples"] for entry in each),
        "repeats": sum(entry["repeats"] for entry in each),
        "epochs": epochs,
        "tokens": tokens,
        "target_tokens": sum(entry["target_tokens"] for entry in each),
        "fill_fraction": tokens / (rows * capacity),
        "dropped": sum(entry["dropped"] for entry in each),
        "truncated": sum(entry["truncated"] for entry in each),
        "empty": sum(entry["empty"] for entry in each),
        "datasets": each,
    }
