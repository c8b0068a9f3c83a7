"""A text dataset as an objective sees it: chunks of documents, each an example of inputs and targets.

    documents       0        1                    2        (<prefix>_text_document)
    chunks          0        1         2          3        examples of this dataset
    inputs          0.85 n   0.85 n    0.85 n     -        lengths from those of the chunks alone, no token read
    targets         n + 1    n + 1     n + 1      0        chunk 3 has one token: no example; counted as empty
    tokens                   made when a row is read, with noise of the row's place in the run

It has the interface of `ExampleDataset`, so that mixtures, packing, rows, plans and guards need not know of objectives.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.objective import ObjectiveConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.indexed_dataset import IndexedDataset
from megatron_xmtf.data.objectives.chunks import Chunks
from megatron_xmtf.data.objectives.counter_random import chunk_key, chunk_keys, key_of, occurrence_key, occurrence_keys
from megatron_xmtf.data.objectives.resolve import build_rule, choose_chunk_length
from megatron_xmtf.data.objectives.rule import Example
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import DatasetError

__all__ = ["ObjectiveCounts", "ObjectiveDataset"]

BLOCK = 1 << 20
"""Chunks or documents looked at at a time."""
FIRST_OCCURRENCE = 0
OBJECTIVES_VERSION = 2
"""Part of the key of every index with an objective: raised by any change that makes other examples of the same data."""


class ObjectiveCounts(TypedDict):
    """What an objective made of the documents of a dataset; nothing is lost that is not in here."""

    objective: str
    documents: int
    document_tokens: int
    """Without EOS."""
    chunk_length: int
    chunks: int
    cut_documents: int
    """Documents that are more than one chunk."""
    too_short: int
    """Chunks of fewer than two tokens, which make no example: the column `empty` of a plan."""
    too_short_tokens: int
    """Tokens in them: the only ones that no example has."""


class ObjectiveDataset(ExampleDataset):
    """Examples that an objective makes of the documents of a text dataset.

    Args:    source: of kind "text". lengths: of the run's rows.
    Raises:  DatasetError: another kind, or documents of which only some end with EOS. TokenizerError, ConfigError: as
             `build_rule` and `choose_chunk_length`.
    """

    def __init__(
        self, source: ExampleDataset, objective: ObjectiveConfig, *, tokenizer: Tokenizer, lengths: RowLengths
    ) -> None:
        if source.kind != "text":
            raise DatasetError(
                f"dataset {source.name!r} ({source.prefix}) holds inputs and targets, and objective {objective.name} "
                "takes documents; leave the objective out, or preprocess texts with `--kind text`."
            )
        # The files are the source's: nothing is opened here.
        self.prefix, self.name, self.kind, self.manifest = source.prefix, source.name, "pairs", source.manifest
        self.source, self.objective = source, objective
        self.rule = build_rule(objective, tokenizer, cut_moves=not isinstance(lengths, EncoderDecoderLengths))
        (self._file,) = source.halves.values()
        has_eos = _ends_with_eos(source, self._file, eos_id=tokenizer.eos_id)
        self.chunks = Chunks(
            self._file.lengths - np.int32(has_eos), chunk_length=choose_chunk_length(objective, self.rule, lengths)
        )
        self._key = key_of(objective.seed, objective.name, source.name)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Example:
        """Return an example with the noise of its first occurrence."""
        return self.example(index, occurrence=FIRST_OCCURRENCE)

    def example(self, number: int, *, occurrence: int) -> Example:
        """Return (inputs, targets), int32, as this occurrence of a chunk has them; empty ones of a chunk too short."""
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {self.name}, which has {len(self)}")
        document, first, length, is_end = self.chunks.locate(number)
        if length < 2:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        tokens = self._file[document][first : first + length].astype(np.int32)
        own = chunk_key(number, key=self._key)
        return self.rule.example(tokens, is_end=is_end, chunk_key=own, noise_key=occurrence_key(own, occurrence))

    @cached_property
    def _lengths(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        inputs, targets = np.zeros(len(self), np.int32), np.zeros(len(self), np.int32)
        for begin in range(0, len(self), BLOCK):
            end = min(begin + BLOCK, len(self))
            tokens, is_end = self.chunks.lengths(begin, end)
            keys = self._keys(np.arange(begin, end, dtype=np.uint64), np.uint64(FIRST_OCCURRENCE))
            inputs[begin:end], targets[begin:end] = self.rule.lengths(tokens, is_end=is_end, keys=keys)
        return inputs, targets

    def _keys(self, chunks: NDArray[np.uint64], occurrences: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
        """Return what decides the lengths of occurrences of chunks, uint64 [n]."""
        keys = chunk_keys(chunks, key=self._key)
        return occurrence_keys(keys, np.asarray(occurrences)) if self.rule.cut_moves else keys

    def occurrence_lengths(
        self, examples: NDArray[np.integer], occurrences: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of inputs and targets of some occurrences; see `ExampleDataset.occurrence_lengths`."""
        if not self.rule.cut_moves:
            return super().occurrence_lengths(examples, occurrences)
        tokens, is_end = self.chunks.lengths_of(np.asarray(examples, np.int64))
        keys = self._keys(np.asarray(examples, np.uint64), np.asarray(occurrences, np.uint64))
        return self.rule.lengths(tokens, is_end=is_end, keys=keys)

    @property
    def input_lengths(self) -> NDArray[np.int32]:
        """Tokens of the inputs, int32 [examples]; where the cut moves, those of the first occurrence."""
        return self._lengths[0]

    @property
    def target_lengths(self) -> NDArray[np.int32]:
        """Tokens of the targets, int32 [examples], as `input_lengths`; 0 where a chunk is too short for an example."""
        return self._lengths[1]

    @property
    def inputs_end_with_eos(self) -> bool:
        """Whether the objective ends inputs with EOS itself."""
        return self.rule.ends_inputs

    @property
    def halves(self) -> dict[str, IndexedDataset]:
        """The file of the documents."""
        return self.source.halves

    def column(self, name: str) -> NDArray[Any] | None:
        """Return the integers of a column, [examples]: those of the documents."""
        values = self.source.column(name)
        return None if values is None else values[self.chunks.documents]

    @property
    def documents(self) -> NDArray[np.uint64] | None:
        """Number of the document of each example, uint64 [examples]; None where the source has none."""
        documents = self.source.documents
        return None if documents is None else documents[self.chunks.documents]

    @property
    def places(self) -> NDArray[np.uint64]:
        """Place of the document of each example, uint64 [examples]."""
        return self.chunks.documents.astype(np.uint64)

    def verify_contents(self, *, vocab_size: int | None = None) -> None:
        """Read everything; see `ExampleDataset.verify_contents`."""
        self.source.verify_contents(vocab_size=vocab_size)

    def facts(self) -> dict[str, Any]:
        """Return what changes the examples, in plain values: part of the key of a packing index."""
        settings = {"chunk_length": self.chunks.chunk_length, "seed": self.objective.seed}
        return {"version": OBJECTIVES_VERSION, **self.rule.facts(), **settings}

    def counts(self) -> ObjectiveCounts:
        """Count documents, chunks, and what makes no example."""
        lengths = self.chunks.document_lengths
        short = lengths[lengths < 2]
        return {
            "objective": self.objective.name,
            "documents": len(lengths),
            "document_tokens": int(lengths.sum(dtype=np.int64)),
            "chunk_length": self.chunks.chunk_length,
            "chunks": len(self),
            "cut_documents": int(np.count_nonzero(lengths > self.chunks.chunk_length)),
            # The parts of a longer document have two tokens at least.
            "too_short": len(short),
            "too_short_tokens": int(short.sum(dtype=np.int64)),
        }


def _ends_with_eos(source: ExampleDataset, file: IndexedDataset, *, eos_id: int) -> bool:
    """Tell whether documents end with EOS: ours all do; of published ones every last token is looked at.

    Raises:  DatasetError: some do and some do not.
    """
    if source.manifest is not None or not len(file):
        return True
    ends = np.cumsum(file.lengths, dtype=np.int64)
    with_eos = 0
    for begin in range(0, len(ends), BLOCK):
        block = slice(begin, begin + BLOCK)
        not_empty = file.lengths[block] > 0
        with_eos += int(np.count_nonzero(file.tokens[ends[block][not_empty] - 1] == eos_id))
    if with_eos not in (0, len(file)):
        raise DatasetError(
            f"{source.prefix}: {with_eos:,} of {len(file):,} documents end with the end-of-sequence id {eos_id}, the "
            "others do not: where a document ends cannot be told. Preprocess the texts again."
        )
    return with_eos > 0
