"""Count examples by dataset, language, template...: what is in the data, what can be read, what the run reads.

records     in the data                       empty       selected, without a target
selected    by split, where, exclude          dropped     selected, too long for a row
available   can be drawn                      truncated   available, inputs cut to fit
examples    drawn, repeats included           epochs      examples / available
                                              most_draws  times that the example read most often is read
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.planning.draws import Draws
from megatron_xmtf.planning.guard_plan import FLAG_BITS
from megatron_xmtf.planning.readable import ReadableExamples

__all__ = ["UNKNOWN", "GuardCounts", "Tally", "TallyRow", "describe", "merge_tallies", "tally_examples"]

BLOCK_EXAMPLES = 1 << 21
"""Examples counted at a time."""
UNKNOWN = "(unknown)"
"""Name of what a record does not say."""


class TallyRow(TypedDict):
    """One line of a plan. Beside these keys it has those that it is grouped by: `dataset`, `language`..."""

    records: int
    selected: int
    available: int
    empty: int
    dropped: int
    truncated: int
    examples: int
    distinct_examples: int
    """Available examples that are read at least once."""
    tokens: int
    target_tokens: int
    """Labels that the loss is taken over."""
    example_fraction: float
    loss_fraction: float
    """Part of the run's loss, as `loss.normalization` weighs it."""
    epochs: float
    most_draws: int


class GuardCounts(TypedDict, total=False):
    """Further keys of a line, for what the guards looked for; of the selected records."""

    duplicates: int
    """Records that repeat an earlier one."""
    near_duplicates: int
    contaminated: int
    """Records that hold a text of an evaluation task."""


@dataclass
class Tally:
    """Counts of one group; sums, but for `most_draws`."""

    records: int = 0
    selected: int = 0
    available: int = 0
    empty: int = 0
    dropped: int = 0
    truncated: int = 0
    examples: int = 0
    distinct_examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    loss: float = 0.0
    """In units of the loss: target tokens, targets, or micro-batches."""
    most_draws: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0

    def add(self, other: Tally) -> None:
        """Take another group's counts in."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(mine, theirs) if field.name == "most_draws" else mine + theirs)


Tallies = dict[tuple[str, ...], Tally]
"""Counts by the names of a group, such as (dataset, language)."""


def tally_examples(
    datasets: Sequence[ExampleDataset],
    readable: Sequence[ReadableExamples],
    draws: Draws,
    *,
    by: Sequence[str],
    normalization: str,
    flags: Sequence[NDArray[np.uint8]] | None = None,
) -> Tallies:
    """Count by the names of some columns.

    Args:    by: columns of the data, or "entry", the dataset's own name in the configuration. "dataset" is what the
             records say, and where they do not, the entry. flags: of the guards, [examples] of each dataset.
    Returns: counts by the tuple of names, in the order of the data.
    """
    found: Tallies = {}
    for number, (dataset, examples) in enumerate(zip(datasets, readable, strict=True)):
        names, columns = _group_columns(dataset, by)
        counts = _Counts(len(names))
        for first in range(0, len(dataset), BLOCK_EXAMPLES):
            block = slice(first, min(first + BLOCK_EXAMPLES, len(dataset)))
            codes = _group_codes(columns, block)
            times = draws.times[number][block]
            values = _block_values(dataset, examples, block, times=times)
            if normalization == "target_token":
                loss = values["target_tokens"]
            elif draws.batch_loss is None:
                loss = times * (values["target_tokens"] > 0)
            else:
                loss = draws.batch_loss[number][block]
            if flags is not None:
                for column, bits in FLAG_BITS.items():
                    values[column] = values["selected"] & ((flags[number][block] & np.uint8(bits)) != 0)
            counts.add(codes, loss=loss, **values)
            np.maximum.at(counts.most_draws, codes, times)
        for code, name in enumerate(names):
            if counts.sums["records"][code]:
                found.setdefault(name, Tally()).add(counts.tally(code))
    return found


def _block_values(
    dataset: ExampleDataset, readable: ReadableExamples, block: slice, *, times: NDArray[np.uint32]
) -> dict[str, NDArray[Any]]:
    """Return what each example of a block adds to the sums of its group; the ids of what fits ascend."""
    fitting, selected, available = readable.fitting, readable.is_selected[block], readable.is_available[block]
    whole = dataset.input_lengths[block].astype(np.int64) + dataset.target_lengths[block] + fitting.input_ends
    has_target = np.asarray(dataset.target_lengths[block]) > 0
    bounds = np.searchsorted(fitting.ids, np.array([block.start, block.stop], fitting.ids.dtype))
    inside = slice(int(bounds[0]), int(bounds[1]))
    places = fitting.ids[inside].astype(np.int64) - block.start
    fits = np.zeros(len(whole), np.bool_)
    lengths, target_tokens = np.zeros(len(whole)), np.zeros(len(whole))
    fits[places] = True
    lengths[places] = fitting.lengths[inside]
    target_tokens[places] = fitting.target_tokens[inside]
    return {
        "records": np.ones(len(whole), np.bool_),
        "selected": selected,
        "available": available,
        "empty": selected & ~has_target,
        "dropped": selected & has_target & ~fits,
        "truncated": available & (whole > lengths),
        "examples": times,
        "distinct_examples": times > 0,
        "tokens": times * lengths,
        "target_tokens": times * target_tokens,
    }


class _Counts:
    """Sums by group code."""

    def __init__(self, groups: int) -> None:
        self.sums = {field.name: np.zeros(groups, np.float64) for field in fields(Tally) if field.name != "most_draws"}
        self.most_draws = np.zeros(groups, np.uint32)

    def add(self, codes: NDArray[np.int64], **values: NDArray[Any]) -> None:
        for name, weights in values.items():
            # Sums of whole numbers in float64 are exact up to 2^53.
            self.sums[name] += np.bincount(codes, weights=weights, minlength=len(self.most_draws))

    def tally(self, code: int) -> Tally:
        whole = {name: int(sums[code]) for name, sums in self.sums.items() if name != "loss"}
        return Tally(**whole, loss=float(self.sums["loss"][code]), most_draws=int(self.most_draws[code]))


def _group_columns(
    dataset: ExampleDataset, by: Sequence[str]
) -> tuple[list[tuple[str, ...]], list[tuple[NDArray[Any] | None, int]]]:
    """Return the names of the groups; for each column its integers [examples], or None, and how many names it has."""
    groups: list[tuple[str, ...]] = [()]
    columns = []
    for column in by:
        values = None if column == "entry" else dataset.column(column)
        missing = dataset.name if column in ("entry", "dataset") else UNKNOWN
        names = [missing] if values is None else [name or missing for name in dataset.names(column)]
        groups = [(*group, name) for group in groups for name in names]
        columns.append((values, len(names)))
    return groups, columns


def _group_codes(columns: Sequence[tuple[NDArray[Any] | None, int]], block: slice) -> NDArray[np.int64]:
    """Return the group of each example of a block: columns of 3 and 5 names, values 1 and 4 -> 1 * 5 + 4."""
    codes = np.zeros(block.stop - block.start, np.int64)
    for values, names in columns:
        codes *= names
        if values is not None:
            codes += values[block]
    return codes


def merge_tallies(tallies: Tallies, keep: Iterable[int]) -> Tallies:
    """Sum over all names but those at the places `keep` of the key."""
    places, merged = list(keep), Tallies()
    for key, tally in tallies.items():
        merged.setdefault(tuple(key[place] for place in places), Tally()).add(tally)
    return merged


def describe(tallies: Tallies, *, guards: Sequence[str] = ()) -> dict[tuple[str, ...], Any]:
    """Turn counts into lines of a plan, the largest part of the loss first.

    Args:    guards: keys of `GuardCounts` that the lines get.
    Returns: `TallyRow` and those keys, by name of the group.
    """
    examples, loss = sum(tally.examples for tally in tallies.values()), sum(tally.loss for tally in tallies.values())
    rows: dict[tuple[str, ...], Any] = {}
    for key, tally in sorted(tallies.items(), key=lambda entry: (-entry[1].loss, entry[0])):
        row: TallyRow = {
            "records": tally.records,
            "selected": tally.selected,
            "available": tally.available,
            "empty": tally.empty,
            "dropped": tally.dropped,
            "truncated": tally.truncated,
            "examples": tally.examples,
            "distinct_examples": tally.distinct_examples,
            "tokens": tally.tokens,
            "target_tokens": tally.target_tokens,
            "example_fraction": tally.examples / max(examples, 1),
            "loss_fraction": tally.loss / loss if loss else 0.0,
            "epochs": tally.examples / tally.available if tally.available else 0.0,
            "most_draws": tally.most_draws,
        }
        rows[key] = {**row, **{name: getattr(tally, name) for name in guards}}
    return rows
