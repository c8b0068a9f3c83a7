"""The key of a packing index: a hash of everything that decides which rows it has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_xmtf.config.mixture import MixtureConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.data.best_fit import ALGORITHM_VERSION
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import LongExamples
from megatron_xmtf.data.objectives import ObjectiveDataset
from megatron_xmtf.data.two_sided_fit import TWO_SIDED_VERSION
from megatron_xmtf.files import sha256_json

if TYPE_CHECKING:
    from megatron_xmtf.data.guards import GuardFlags

__all__ = ["packing_key"]

MIXTURE_VERSION = 3
"""Part of every packing key: raised by any change that draws other examples for the same mixture and seed."""
HASH_BLOCK = 1 << 20
"""Lengths hashed at a time."""


def packing_key(
    datasets: Sequence[ExampleDataset],
    *,
    mixture: MixtureConfig,
    split_seed: int,
    sequence_length: RowLengths,
    long_examples: LongExamples,
    seed: int,
    rows_needed: int | None,
    guards: GuardFlags | None = None,
) -> tuple[str, dict[str, Any]]:
    """Hash everything that changes a packing index.

    Returns: (SHA-256 in hexadecimal, what was hashed). A dataset counts by its manifest's content, or without
             one by its sizes; never by its path, so that moved data keep their index.
    """
    dropped = guards.settings.dropped() if guards is not None else ()
    inputs = {
        "algorithm_version": [ALGORITHM_VERSION, MIXTURE_VERSION],
        "datasets": [
            {"name": dataset.name, "kind": dataset.kind, "sha256": _dataset_hash(dataset), **_objective(dataset)}
            for dataset in datasets
        ],
        "mixture": _without_paths(mixture),
        "split_seed": split_seed,
        "sequence_length": _key_of_lengths(sequence_length),
        "long_examples": long_examples,
        "seed": seed,
        "rows_needed": rows_needed,
        # Guards that only report change no row, so that a plan opens the index that training opens.
        "guards": {"key": guards.key, "drop": list(dropped)} if guards is not None and dropped else None,
    }
    return sha256_json(inputs), inputs


def _key_of_lengths(lengths: RowLengths) -> int | dict[str, Any]:
    """Return what is hashed of a row's lengths; a decoder's stay the number they have always been."""
    if isinstance(lengths, EncoderDecoderLengths):
        return {**asdict(lengths), "two_sided_version": TWO_SIDED_VERSION}
    return lengths


def _without_paths(mixture: MixtureConfig) -> dict[str, Any]:
    """Return the mixture with datasets named by their numbers, and without what is for the reader.

    What an objective makes of documents is told by `_objective` of each dataset; here is which entry reads which.
    """
    number_of = {prefix: number for number, prefix in enumerate(mixture.prefixes())}

    def numbered(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: number_of[one] if key == "prefix" and one is not None else numbered(one)
                for key, one in value.items()
                if key != "objective"
            }
        return [numbered(one) for one in value] if isinstance(value, list) else value

    values = numbered(mixture.model_dump(mode="json", exclude={"root", "source", "name", "validation"}))
    sources = mixture.sources()
    if any(source.objective is not None for source in sources):
        values["datasets_read"] = [sources.index(source) for source, _, _ in mixture.selections()]
    if mixture.pinch is not None:
        values["pinch"]["prefixes"] = [number_of[prefix] for prefix in mixture.pinch.prefixes]
    return dict(values)


def _objective(dataset: ExampleDataset) -> dict[str, Any]:
    """Return what makes examples of documents; nothing for a dataset read as it is."""
    return {"objective": dataset.facts()} if isinstance(dataset, ObjectiveDataset) else {}


def _dataset_hash(dataset: ExampleDataset) -> str:
    if dataset.manifest is not None:
        return sha256_json(dataset.manifest)
    digest = hashlib.sha256()
    for lengths in (dataset.input_lengths, dataset.target_lengths):
        for begin in range(0, len(lengths), HASH_BLOCK):
            digest.update(lengths[begin : begin + HASH_BLOCK].astype(np.int64).tobytes())
    return digest.hexdigest()
