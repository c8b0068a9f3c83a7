"""Turn chunks of lines into token ids, in this process or in worker processes, always in input order.

    {"inputs": "2+2?", "targets": "4"}   ->   inputs  tok("2+2?")     targets  tok(" " + "4") ++ [EOS]
    {"inputs": "2+2?", "targets": " "}   ->   dropped as a pair, counted under empty_targets

Inputs are encoded without any special token. The target prefix (a space by default, as BLOOMZ did) makes the
target a continuation: the ids are those that the model meets when the answer follows the prompt in one text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_xmtf.data.dataset_manifest import COLUMNS, Kind
from megatron_xmtf.data.indexed_dataset import token_dtype
from megatron_xmtf.data.records import BadRecord, InputPosition, LineChunk, Record, RecordFormat, RecordParser
from megatron_xmtf.data.segment_encoder import SegmentEncoder
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import RecordError
from megatron_xmtf.worker_pool import WorkerPool, one_tokenizer_thread

__all__ = ["ChunkEncoder", "EncodeSettings", "EncodedChunk", "encode_chunks"]


@dataclass(frozen=True)
class EncodeSettings:
    """Everything that decides the ids, beside the records; sent to the workers once."""

    tokenizer_directory: Path
    kind: Kind
    record_format: RecordFormat
    field_map: tuple[tuple[str, str], ...]
    """(field of the format or column, its name in the files)."""
    target_prefix: str
    """Put before every target (not before the documents of kind "text") ahead of tokenisation."""
    on_bad_record: Literal["error", "skip"]


@dataclass(frozen=True)
class EncodedChunk:
    """The examples of one chunk, ready to be written."""

    halves: dict[str, tuple[np.ndarray, np.ndarray]]
    """Half -> (token ids one after another, tokens of each example)."""
    columns: dict[str, tuple[list[str], np.ndarray]]
    """Column -> (names in the order of appearance, index of each example's name)."""
    documents: np.ndarray
    """uint64 [examples], `Record.document`."""
    counts: Counter[str]
    """read, kept, empty_inputs, empty_targets, empty_text, blank_lines, and malformed/<reason>."""
    position: InputPosition
    """`LineChunk.position`."""


@dataclass
class _Kept:
    """Examples that have both halves; ids as bytes of the dataset's dtype."""

    inputs: list[bytes] = field(default_factory=list)
    targets: list[bytes] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


class ChunkEncoder:
    """Encode chunks with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodeSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self._parser = RecordParser(
            kind=settings.kind, record_format=settings.record_format, field_map=dict(settings.field_map)
        )
        self._is_text = settings.kind == "text"
        self._prefix = "" if self._is_text else settings.target_prefix
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eos = np.array([tokenizer.eos_id], self._dtype).tobytes()
        self._segments = SegmentEncoder(tokenizer.backend, tokenizer.segment_rule, dtype=self._dtype)
        # What remains of a target that the tokenizer's normaliser deletes altogether.
        self._nothing = frozenset([b"", *self._segments.encode([self._prefix]), self._eos])

    def encode(self, chunk: LineChunk) -> EncodedChunk:
        """Parse and tokenise a chunk.

        Raises:  RecordError: a malformed line, unless bad records are skipped; names file and line.
        """
        counts: Counter[str] = Counter()
        records = self._nonempty(self._parse(chunk, counts), counts)
        kept = self._tokenize(records, counts)
        counts["kept"] += len(kept.records)
        if self._is_text:
            halves = {"text_document": _flatten(kept.targets, self._dtype)}
        else:
            halves = {
                "inputs_document": _flatten(kept.inputs, self._dtype),
                "targets_document": _flatten(kept.targets, self._dtype),
            }
        columns = _index_columns([record.columns for record in kept.records])
        documents = np.array([record.document for record in kept.records], np.uint64)
        return EncodedChunk(halves, columns, documents, counts, chunk.position)

    def _parse(self, chunk: LineChunk, counts: Counter[str]) -> Iterator[Record]:
        lines = chunk.data.split(b"\n")
        if not lines[-1]:
            lines.pop()  # what follows the last line end is no line
        for number, line in enumerate(lines, chunk.first_line):
            if not line.strip():
                counts["blank_lines"] += 1
                continue
            counts["read"] += 1
            try:
                yield self._parser.parse(line)
            except BadRecord as bad:
                if self.settings.on_bad_record == "error":
                    raise RecordError(
                        f"{chunk.path}:{number} is not a record: {bad.detail}. Correct the line, "
                        "or leave such lines out and have them counted: --on-bad-record skip."
                    ) from None
                counts[f"malformed/{bad.reason}"] += 1

    def _nonempty(self, records: Iterable[Record], counts: Counter[str]) -> list[Record]:
        """Drop, as a pair, every record with a half that is empty or only white space."""
        kept = []
        for record in records:
            if not self._is_text and (not record.inputs or record.inputs.isspace()):
                counts["empty_inputs"] += 1
            elif not record.targets or record.targets.isspace():
                counts["empty_text" if self._is_text else "empty_targets"] += 1
            else:
                kept.append(record)
        return kept

    def _tokenize(self, records: Sequence[Record], counts: Counter[str]) -> _Kept:
        """Encode both halves, end the target with EOS; drop, as a pair, what has come out empty."""
        encode, eos = self._segments.encode, self._eos
        all_targets = encode([record.targets for record in records], prefix=self._prefix)
        all_inputs = [b""] * len(records) if self._is_text else encode([record.inputs for record in records])
        kept = _Kept()
        for record, inputs, targets in zip(records, all_inputs, all_targets, strict=True):
            if not self._is_text and not inputs:
                counts["empty_inputs"] += 1
            elif targets in self._nothing:
                counts["empty_text" if self._is_text else "empty_targets"] += 1
            else:
                kept.inputs.append(inputs)
                kept.targets.append(targets + eos)
                kept.records.append(record)
        return kept


def encode_chunks(
    chunks: Iterable[LineChunk], *, tokenizer: Tokenizer, settings: EncodeSettings, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encode chunks in order; with 1 worker in this process, else in `workers` processes of their own.

    Close the generator (`contextlib.closing`) so that an error of the caller ends the workers too.

    Raises:  RecordError: as `ChunkEncoder.encode`. RankFailedError: a worker process was killed.
    """
    if workers == 1:
        encoder = ChunkEncoder(tokenizer, settings)
        for chunk in chunks:
            with one_tokenizer_thread():
                encoded = encoder.encode(chunk)
            yield encoded
        return
    with WorkerPool(workers, state=settings, setup=_load_encoder) as pool:
        yield from pool.map(ChunkEncoder.encode, chunks)


def _load_encoder(settings: EncodeSettings) -> ChunkEncoder:
    return ChunkEncoder(Tokenizer.load(settings.tokenizer_directory), settings)


def _flatten(sequences: Sequence[bytes], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences)) // dtype.itemsize
    return np.frombuffer(b"".join(sequences), dtype), lengths


def _index_columns(rows: Sequence[tuple[str, ...]]) -> dict[str, tuple[list[str], np.ndarray]]:
    """Return, of each column, its values in the order of appearance, and the index of each row's value among them."""
    code_of: dict[tuple[str, ...], int] = {}
    codes = np.fromiter((code_of.setdefault(row, len(code_of)) for row in rows), np.uint32, len(rows))
    columns = {}
    for number, name in enumerate(COLUMNS):
        values = [row[number] for row in code_of]
        index_of = {value: index for index, value in enumerate(dict.fromkeys(values))}
        table = np.array([index_of[value] for value in values], np.uint32)
        columns[name] = list(index_of), table[codes]
    return columns
