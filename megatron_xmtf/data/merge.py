"""Concatenate datasets into one: examples, documents and columns, in the order given, streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.example_writer import ExampleDatasetWriter
from megatron_xmtf.errors import ConfigError, DatasetError
from megatron_xmtf.progress import Progress

__all__ = ["merge_datasets"]

BLOCK_TOKENS = 1 << 24
"""Tokens copied at a time: 64 MiB of int32."""


def merge_datasets(
    prefixes: Sequence[Path | str],
    *,
    output_prefix: Path | str,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write the examples of `prefixes`, one dataset after another, to `output_prefix`.

    Returns: the manifest. A column that a dataset lacks is "" for its examples; counts are added up. Documents are
             kept where every dataset has them; else "without_documents" names the datasets that do not.
    Raises:  ConfigError: no input, or the output is one of them. DatasetError: an input cannot be opened, or
             differs from the first in kind, token type, tokenizer or target prefix.
    """
    if not prefixes:
        raise ConfigError("no datasets to merge; give one or more prefixes.")
    if Path(output_prefix).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise ConfigError(f"{output_prefix} is an input of the merge as well as its output; choose another prefix.")
    datasets = [ExampleDataset.open(prefix) for prefix in prefixes]
    for dataset in datasets[1:]:
        _refuse_difference(datasets[0], dataset)
    first = datasets[0]
    dtype = next(iter(first.halves.values())).dtype
    with_documents = not _without_documents(datasets)
    total = sum(len(dataset) for dataset in datasets)
    with ExampleDatasetWriter(
        output_prefix, kind=first.kind, dtype=dtype, overwrite=overwrite, with_documents=with_documents
    ) as writer:
        with Progress("merge", total=total, unit="examples", enabled=show_progress) as progress:
            for dataset in datasets:
                columns = {
                    name: (dataset.names(name), values)
                    for name in dataset.column_names
                    if (values := dataset.column(name)) is not None
                }
                numbers = dataset.documents if with_documents else None
                for start, stop in _blocks(dataset):
                    _copy(dataset, columns, numbers, writer, start, stop)
                    progress.advance(stop - start)
        return writer.commit(_facts(datasets))


def _refuse_difference(first: ExampleDataset, other: ExampleDataset) -> None:
    """Raise DatasetError where the examples of two datasets do not mean the same thing."""

    def dtype(dataset: ExampleDataset) -> str:
        return "/".join(half.dtype.name for half in dataset.halves.values())

    def tokenizer(dataset: ExampleDataset) -> str:
        info = dataset.tokenizer_info
        if info is None:
            return "unknown (no manifest)"
        return f"{info['fingerprint'][:12]}... with {info['vocab_size']} ids, end-of-sequence {info['eos_id']}"

    def target_prefix(dataset: ExampleDataset) -> str:
        return "unknown" if dataset.manifest is None else repr(dataset.manifest.get("target_prefix"))

    described = [
        ("kind", first.kind, other.kind),
        ("token type", dtype(first), dtype(other)),
        ("tokenizer", tokenizer(first), tokenizer(other)),
        ("target prefix", target_prefix(first), target_prefix(other)),
    ]
    for what, one, two in described:
        if one != two:
            raise DatasetError(
                f"{first.prefix} and {other.prefix} cannot be merged: their {what} differs, {one} and {two}. "
                "Preprocess them alike, or name both in the run's configuration as two datasets."
            )


def _without_documents(datasets: Sequence[ExampleDataset]) -> list[str]:
    """Name the datasets that do not say which examples are of one document."""
    return [
        str(dataset.prefix) for dataset in datasets if dataset.manifest is None or not dataset.manifest.get("documents")
    ]


def _blocks(dataset: ExampleDataset) -> list[tuple[int, int]]:
    """Cut the examples into ranges of about `BLOCK_TOKENS` tokens that end where documents end."""
    cuts = [0]
    documents = next(iter(dataset.halves.values())).document_indices
    for half in dataset.halves.values():
        if not np.array_equal(half.document_indices, documents):
            raise DatasetError(f"{dataset.prefix}: inputs and targets are grouped into different documents.")
    tokens = np.cumsum(dataset.input_lengths, dtype=np.int64) + np.cumsum(dataset.target_lengths, dtype=np.int64)
    while cuts[-1] < len(dataset):
        done = int(tokens[cuts[-1] - 1]) if cuts[-1] else 0
        wanted = max(int(np.searchsorted(tokens, done + BLOCK_TOKENS, side="right")), cuts[-1] + 1)
        cuts.append(int(documents[np.searchsorted(documents, wanted)]))
    return list(zip(cuts, cuts[1:], strict=False))


def _copy(
    dataset: ExampleDataset,
    columns: Mapping[str, tuple[Sequence[str], np.ndarray]],
    numbers: np.ndarray | None,
    writer: ExampleDatasetWriter,
    start: int,
    stop: int,
) -> None:
    halves = {}
    for name, half in dataset.halves.items():
        begin, end = half.token_range(start, stop)
        halves[name] = (half.tokens[begin:end], half.lengths[start:stop])
    documents = next(iter(dataset.halves.values())).document_indices
    # Documents without a sequence belong to the range after them, at the end to the last one.
    low = int(np.searchsorted(documents, start))
    high = int(np.searchsorted(documents, stop)) if stop < len(dataset) else len(documents) - 1
    part = {name: (names, values[start:stop]) for name, (names, values) in columns.items()}
    writer.add(
        halves,
        part,
        documents=None if numbers is None else numbers[start:stop],
        document_lengths=np.diff(documents[low : high + 1]),
    )


def _facts(datasets: Sequence[ExampleDataset]) -> dict[str, Any]:
    manifests = [dataset.manifest for dataset in datasets]
    known = [manifest for manifest in manifests if manifest is not None]
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for manifest in known:
        own = dict(manifest.get("counts", {}))
        reasons.update(own.pop("malformed_reasons", {}))
        counts.update(own)
    facts: dict[str, Any] = {
        "tokenizer": known[0]["tokenizer"] if known else None,
        "target_prefix": known[0].get("target_prefix") if known else None,
        "merged_from": [{"prefix": str(dataset.prefix), "num_examples": len(dataset)} for dataset in datasets],
        "without_documents": _without_documents(datasets),
        "sources": [source for manifest in known for source in manifest.get("sources", [])],
    }
    if known:
        facts["counts"] = {**counts, "malformed_reasons": dict(reasons)}
    return facts
