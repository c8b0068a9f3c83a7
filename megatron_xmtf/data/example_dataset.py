"""One preprocessed dataset: examples of inputs and targets as token ids, with what is known about them.

    <prefix>_inputs_document.{bin,idx}     kind "pairs": what the model reads
    <prefix>_targets_document.{bin,idx}    kind "pairs": what it is trained to answer, ending with EOS
    <prefix>_text_document.{bin,idx}       kind "text": whole documents, ending with EOS
    <prefix>_columns.npz                   per example: small integers for dataset, language ...; its document
    <prefix>.json                          manifest, written last: tokenizer, counts, names of the columns, hashes

Published Megatron data without a manifest opens too; its tokenizer then cannot be checked, and a warning says so.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.dataset_columns import read_column
from megatron_xmtf.data.dataset_manifest import (
    COLUMNS_FILE,
    DOCUMENTS,
    HALVES,
    Kind,
    dataset_file,
    find_kind,
    manifest_path,
    read_manifest,
    verify_sizes,
)
from megatron_xmtf.data.indexed_dataset import IndexedDataset
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import DatasetError, TokenizerError
from megatron_xmtf.files import sha256_file

__all__ = [
    "ExampleDataset",
]

logger = logging.getLogger(__name__)

TOKEN_BLOCK = 1 << 22
"""Tokens compared at a time by the deep check."""


class ExampleDataset:
    """Examples of one prefix; open with `ExampleDataset.open`, which verifies that they are whole and consistent.

    dataset[3] is the fourth example: (inputs, targets), int32 token ids; for kind "text" the inputs are empty.
    """

    prefix: Path
    name: str
    """Name in reports."""
    kind: Kind
    manifest: dict[str, Any] | None
    """Contents of `<prefix>.json`; None for data that was published without one."""

    def __init__(self, prefix: Path, *, name: str, kind: Kind, manifest: dict[str, Any] | None) -> None:
        self.prefix, self.name, self.kind, self.manifest = prefix, name, kind, manifest
        halves = [IndexedDataset(dataset_file(prefix, half)) for half in HALVES[kind]]
        self._targets = halves[-1]
        self._inputs = halves[0] if kind == "pairs" else None
        if self._inputs is not None and len(self._inputs) != len(self._targets):
            raise DatasetError(
                f"{prefix} holds {len(self._inputs)} inputs but {len(self._targets)} targets; the halves belong to "
                "different datasets or fell out of step. Preprocess the records again."
            )

    @classmethod
    def open(
        cls,
        prefix: Path | str,
        *,
        name: str | None = None,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        deep: bool = False,
    ) -> ExampleDataset:
        """Open and verify the dataset at `prefix`.

        Args:    name: name in reports, by default the last part of the prefix. tokenizer: the model's; the dataset
                 must have been made with the same one. vocab_size: the model's; every id must be below it.
                 deep: also read everything: compare the hashes and every token id.
        Raises:  DatasetError: a file is missing, altered, or does not fit the others. TokenizerError: made with
                 another tokenizer, or for a larger vocabulary.
        """
        prefix = Path(prefix)
        manifest = read_manifest(prefix)
        kind = find_kind(prefix, manifest)
        if manifest is not None:
            verify_sizes(prefix, manifest)
        dataset = cls(prefix, name=name or prefix.name, kind=kind, manifest=manifest)
        if manifest is not None and manifest["num_examples"] != len(dataset):
            raise DatasetError(
                f"{manifest_path(prefix)} announces {manifest['num_examples']} examples, the files hold "
                f"{len(dataset)}; the manifest belongs to another dataset. Preprocess the records again."
            )
        dataset._verify_tokenizer(tokenizer, vocab_size)
        if deep:
            dataset.verify_contents(vocab_size=tokenizer.vocab_size if tokenizer and not vocab_size else vocab_size)
        return dataset

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        targets = self._targets[index].astype(np.int32)
        if self._inputs is None:
            return np.empty(0, np.int32), targets
        return self._inputs[index].astype(np.int32), targets

    def example(self, number: int, *, occurrence: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of an example as one of its occurrences in a run has them.

        Args:    occurrence: place of the segment in the packing index. Stored examples are the same at every place;
                 what an objective makes of a document (`data.objectives`) has other noise at each.
        """
        return self[number]

    @property
    def inputs_end_with_eos(self) -> bool:
        """Whether the inputs already end with EOS. Preprocessing stores them without, whatever the model."""
        return False

    @property
    def places(self) -> np.ndarray:
        """Place in the files of the document that each example is of, uint64 [examples]."""
        return np.arange(len(self), dtype=np.uint64)

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of the targets, EOS included, int32 [examples]."""
        return self._targets.lengths

    @cached_property
    def input_lengths(self) -> np.ndarray:
        """Tokens of the inputs, int32 [examples]; zeros for kind "text"."""
        return np.zeros(len(self), np.int32) if self._inputs is None else self._inputs.lengths

    def occurrence_lengths(
        self, examples: NDArray[np.integer], occurrences: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of inputs and targets of examples at places of a packing index, int64 [n] each.

        Their sums are those of `input_lengths` and `target_lengths`; here the parts are as well, wherever they stand.
        """
        return self.input_lengths[examples].astype(np.int64), self.target_lengths[examples].astype(np.int64)

    @property
    def halves(self) -> dict[str, IndexedDataset]:
        """The indexed files, by name: `inputs_document` and `targets_document`, or `text_document`."""
        files = [self._targets] if self._inputs is None else [self._inputs, self._targets]
        return dict(zip(HALVES[self.kind], files, strict=True))

    @property
    def tokenizer_info(self) -> dict[str, Any] | None:
        """Fingerprint, vocab_size and eos_id of the tokenizer that made the dataset; None where unknown."""
        return None if self.manifest is None else self.manifest["tokenizer"]

    @property
    def column_names(self) -> list[str]:
        """Columns that this dataset has, a subset of `COLUMNS`."""
        return [] if self.manifest is None else list(self.manifest["columns"])

    def names(self, column: str) -> list[str]:
        """Return the names that the integers of `column` stand for; "" is a record that did not say."""
        if column not in self.column_names:
            return []
        assert self.manifest is not None
        return list(self.manifest["columns"][column]["names"])

    def column(self, name: str) -> np.ndarray | None:
        """Return the integers of a column, [examples], indices into `names(name)`; None where there is none.

        Raises:  DatasetError: the column's file is damaged or does not fit the dataset.
        """
        if name not in self.column_names:
            return None
        path = dataset_file(self.prefix, COLUMNS_FILE)
        values = read_column(path, name, count=len(self))
        if len(values) and int(values.max()) >= len(self.names(name)):
            raise DatasetError(
                f"{path}: column {name!r} reaches {int(values.max())}, but the manifest has {len(self.names(name))} "
                "names; the files belong to different datasets."
            )
        return values

    @property
    def documents(self) -> np.ndarray | None:
        """Number of the document of each example, uint64 [examples], a read-only map; None for data without them.

        Examples of one source row have the same number, whatever their template or language (`data.records`).

        Raises:  DatasetError: the columns' file is damaged or does not fit the dataset.
        """
        if self.manifest is None or not self.manifest.get("documents"):
            return None
        path = dataset_file(self.prefix, COLUMNS_FILE)
        documents = read_column(path, DOCUMENTS, count=len(self))
        if documents.dtype != np.uint64:
            raise DatasetError(f"{path}: documents are {documents.dtype}, not uint64; preprocess the records again.")
        return documents

    def verify_contents(self, *, vocab_size: int | None = None) -> None:
        """Read everything: the SHA-256 of each file against the manifest, and every id against the vocabulary.

        Raises:  DatasetError: a file was altered, or an id is negative or not below `vocab_size` (by default the
                 manifest's), named by example.
        """
        if self.manifest is not None:
            for name, entry in self.manifest["files"].items():
                path = dataset_file(self.prefix, name)
                digest = sha256_file(path)
                if digest != entry["sha256"]:
                    raise DatasetError(
                        f"{path} was altered since it was written: its SHA-256 is {digest[:12]}..., the manifest says "
                        f"{entry['sha256'][:12]}...; copy it again or preprocess the records again."
                    )
        if vocab_size is None and self.tokenizer_info is not None:
            vocab_size = self.tokenizer_info["vocab_size"]
        limit = vocab_size if vocab_size is not None else np.iinfo(np.int32).max
        for half, file in self.halves.items():
            for start in range(0, file.num_tokens, TOKEN_BLOCK):
                block = file.tokens[start : start + TOKEN_BLOCK]
                wrong = (block < 0) | (block >= limit)
                if wrong.any():
                    at = start + int(np.argmax(wrong))
                    example = int(np.searchsorted(np.cumsum(file.lengths, dtype=np.int64), at, side="right"))
                    raise DatasetError(
                        f"{dataset_file(self.prefix, half)}.bin: token id {file.tokens[at]} of example {example} is "
                        f"outside the vocabulary of {limit}; the data was made with another tokenizer."
                    )
        for name in self.column_names:
            self.column(name)
        self.documents  # noqa: B018 - read for its checks

    def _verify_tokenizer(self, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
        info = self.tokenizer_info
        if info is None:
            if tokenizer is not None:
                logger.warning(
                    "%s has no manifest that says which tokenizer made it: that it fits %s cannot be checked",
                    self.prefix,
                    tokenizer.directory,
                )
            return
        if tokenizer is not None and info["fingerprint"] != tokenizer.fingerprint:
            raise TokenizerError(
                f"{self.prefix} was made with the tokenizer {info['fingerprint'][:12]}... ({info['vocab_size']} ids), "
                f"but {tokenizer.directory} is {tokenizer.fingerprint[:12]}... ({tokenizer.vocab_size} ids): "
                "the same ids mean other text. Preprocess the records with this tokenizer, or use the other's model."
            )
        if tokenizer is not None and info["eos_id"] != tokenizer.eos_id:
            raise TokenizerError(
                f"targets of {self.prefix} end with id {info['eos_id']}, but the end-of-sequence id of "
                f"{tokenizer.directory} is {tokenizer.eos_id}; correct eos_token or preprocess the records again."
            )
        if vocab_size is not None and info["vocab_size"] > vocab_size:
            raise TokenizerError(
                f"{self.prefix} was made with a vocabulary of {info['vocab_size']} ids, the model has {vocab_size}; "
                "ids beyond it have no embedding. Use the model's own tokenizer."
            )
