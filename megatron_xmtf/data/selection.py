"""Which examples of a dataset a part of a mixture reads: by document, and by the names in its columns.

    document (a hash)   u = splitmix64(document, split_seed) / 2**64     "0:0.95"      "0.95:1"
    7f3a...             0.12                                             train
    7f3a... (Swahili)   0.12                                             train          a translation goes along
    c81e...             0.97                                                            validation

The bounds are exact integers, so two intervals that share only an end share no document, in any dataset. Data without
document numbers (published without a manifest) are divided by the place of the example instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.mixture import MixtureConfig, SelectionConfig, parse_interval
from megatron_xmtf.data.best_fit import group
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.errors import ConfigError, DatasetError, nearest_names

__all__ = [
    "choose_examples",
    "combinations",
    "document_numbers",
    "in_interval",
    "scramble",
    "select_examples",
    "selected_by_mixture",
]

MOST_COMBINATIONS = 1 << 20


def scramble(values: NDArray[np.uint64], *, seed: int) -> NDArray[np.uint64]:
    """Spread numbers evenly over 64 bits, another way for each seed; equal numbers stay equal.

    Args:    values: uint64 [n]. seed: an integer >= 0.
    Source:  splitmix64 (Steele, Lea & Flood 2014, OOPSLA), its finalizer after a step that the seed sets.
    """
    with np.errstate(over="ignore"):
        mixed = values + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def in_interval(documents: NDArray[np.uint64], interval: str, *, seed: int) -> NDArray[np.bool_]:
    """Tell which documents lie in an interval of [0, 1) such as "0:0.95".

    Args:    documents: uint64 [examples].
    Returns: bool [examples]; the intervals of a partition of [0, 1] partition the documents.
    """
    begin, end = (int(bound * 2**64) for bound in parse_interval(interval))
    places = scramble(documents, seed=seed)
    chosen = places >= np.uint64(begin)
    if end < 2**64:
        chosen &= places < np.uint64(end)
    return chosen


def document_numbers(dataset: ExampleDataset) -> NDArray[np.uint64]:
    """Return the document of each example, uint64 [examples]; its place in the files where none is known."""
    documents = dataset.documents
    return dataset.places if documents is None else np.asarray(documents)


def select_examples(
    dataset: ExampleDataset, selections: Sequence[SelectionConfig], *, split: str | None, split_seed: int
) -> NDArray[np.bool_] | None:
    """Tell which examples are read; None: all.

    Args:    selections: `where` and `exclude` of the entry and of all groups around it; every one must hold.
             split: interval of documents.
    Raises:  ConfigError: a pattern that no name of the dataset matches, or nothing left. DatasetError: no such column.
    """
    chosen: NDArray[np.bool_] | None = None
    if split is not None and parse_interval(split) != (0, 1):
        chosen = in_interval(document_numbers(dataset), split, seed=split_seed)
    for selection in selections:
        for column, patterns in selection.where.items():
            matching = _matching(dataset, column, patterns, what="where")
            chosen = matching if chosen is None else chosen & matching
        for column, patterns in selection.exclude.items():
            others = ~_matching(dataset, column, patterns, what="exclude")
            chosen = others if chosen is None else chosen & others
    if chosen is not None and not chosen.any():
        conditions = [f"documents {split}"] if split is not None else []
        conditions += [
            f"{name} {column}: {', '.join(patterns)}"
            for one in selections
            for name in ("where", "exclude")
            for column, patterns in getattr(one, name).items()
        ]
        raise ConfigError(
            f"dataset {dataset.name!r} ({dataset.prefix}): none of its {len(dataset):,} examples is in the selection "
            f"({'; '.join(conditions)}). Widen it, or leave the dataset out; if the mixture's `validation` holds out "
            "no document of a dataset as small as this, name the validation datasets in data.validation."
        )
    return chosen


def selected_by_mixture(
    datasets: Sequence[ExampleDataset], mixture: MixtureConfig, *, split_seed: int
) -> list[NDArray[np.bool_]]:
    """Tell for each dataset which examples an entry of the mixture, or its pinch, selects, bool [examples].

    Args:    datasets: those of `mixture.sources()`, in that order.
    Raises:  as `select_examples`.
    """
    number_of = {source: number for number, source in enumerate(mixture.sources())}
    selected = [np.zeros(len(dataset), np.bool_) for dataset in datasets]
    for source, selections, split in mixture.selections():
        number = number_of[source]
        chosen = select_examples(datasets[number], selections, split=split, split_seed=split_seed)
        selected[number] |= True if chosen is None else chosen
    return selected


def _matching(dataset: ExampleDataset, column: str, patterns: Sequence[str], *, what: str) -> NDArray[np.bool_]:
    values = dataset.column(column)
    if values is None:
        raise DatasetError(
            f"dataset {dataset.name!r} ({dataset.prefix}) has no column {column!r}, which `{what}` asks for; it has "
            f"{', '.join(dataset.column_names) or 'none'}. Give the records a field {column!r} and preprocess them."
        )
    names = dataset.names(column)
    wanted = np.zeros(len(names), np.bool_)
    for pattern in patterns:
        hits = [fnmatchcase(name, pattern) for name in names]
        if not any(hits):
            raise ConfigError(
                f"`{what}: {{{column}: {pattern}}}` matches no {column} of dataset {dataset.name!r}; "
                f"{nearest_names(pattern, names)}."
            )
        wanted |= hits
    return wanted[values]


def choose_examples(count: int, wanted: int, *, seed: int) -> NDArray[np.bool_]:
    """Choose `wanted` of `count` examples, the same ones whatever else is in the mixture.

    Returns: bool [count]; choosing more keeps those that were chosen before.
    """
    places = scramble(np.arange(count, dtype=np.uint64), seed=seed)
    chosen = np.zeros(count, np.bool_)
    chosen[np.argpartition(places, wanted - 1)[:wanted]] = True
    return chosen


def combinations(
    dataset: ExampleDataset, columns: Sequence[str], examples: NDArray[np.integer]
) -> dict[tuple[str, ...], NDArray[np.integer]]:
    """Divide examples by their names in some columns.

    Args:    examples: int [n], numbers of examples, ascending.
    Returns: names, one for each column -> positions in `examples`, ascending; in the order of the names, and only
             combinations that occur.
    Raises:  DatasetError: no such column.
    """
    codes = np.zeros(len(examples), np.uint32)
    number_of_codes = 1
    for column in columns:
        values = dataset.column(column)
        if values is None:
            raise DatasetError(
                f"dataset {dataset.name!r} ({dataset.prefix}) has no column {column!r} to be divided by; it has "
                f"{', '.join(dataset.column_names) or 'none'}. Give the records a field {column!r}."
            )
        codes *= len(dataset.names(column))
        codes += values[examples]
        number_of_codes *= len(dataset.names(column))
    if number_of_codes > MOST_COMBINATIONS:
        raise ConfigError(
            f"dataset {dataset.name!r}: {number_of_codes:,} combinations of {', '.join(columns)}; at most "
            f"{MOST_COMBINATIONS:,} can be told apart. Divide by fewer columns."
        )
    positions, ends = group(codes.astype(np.min_scalar_type(number_of_codes)), num_keys=number_of_codes)
    parts = {}
    for code, (begin, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        if begin == end:
            continue
        names, rest = [], code
        for column in reversed(columns):
            rest, number = divmod(rest, len(dataset.names(column)))
            names.append(dataset.names(column)[number])
        parts[tuple(reversed(names))] = positions[begin:end]
    return dict(sorted(parts.items()))
