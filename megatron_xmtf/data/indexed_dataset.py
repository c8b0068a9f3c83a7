"""Read Megatron's memory-mapped token files, `MMIDIDX` version 1, byte for byte.

    <prefix>.bin    token ids of all sequences one after another, little-endian, no header
    <prefix>.idx    offset    bytes  content                     N sequences, D = documents + 1
                    0         9      "MMIDIDX\\0\\0"
                    9         8      u64 version = 1
                    17        1      u8 dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16
                    18        8      u64 N
                    26        8      u64 D
                    34        4 N    i32 tokens of each sequence
                    34 +  4N  8 N    i64 byte offset of each sequence in .bin
                    34 + 12N  8 D    i64 first sequence of each document; first 0, last N

Three documents of one sequence each, [5, 6, 7], [8] and [9, 10], in uint16:
    .bin 05 00 06 00 07 00 08 00 09 00 0a 00     .idx lengths 3 1 2, offsets 0 6 8, documents 0 1 2 3

Megatron-Core maps such files without checking one against the other; here every header field, every offset and
both file sizes are verified when a dataset is opened.
Source: the layout of megatron.core.datasets.indexed_dataset, megatron-core 0.16.1.
"""

from __future__ import annotations

import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xmtf.errors import DatasetError

__all__ = ["IndexedDataset", "token_dtype", "with_suffix"]

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOAT_CODES = (6, 7)
"""6 and 7 are floating point (which ones, depends on the Megatron that wrote them): no token ids."""
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
UINT16_VOCAB_LIMIT = 65500
"""Vocabularies below this are stored in uint16, as Megatron's `optimal_dtype` does."""
BLOCK = 1 << 22
"""Index entries verified at a time: 32 MiB of int64."""
REMEDY = "preprocess it again, or copy it again from where it is whole"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which ids below `vocab_size` are stored: uint16 below 65,500, else int32."""
    return np.dtype("<u2" if vocab_size < UINT16_VOCAB_LIMIT else "<i4")


class IndexedDataset:
    """Sequences of token ids in `<path_prefix>.bin` and `.idx`, mapped into memory and verified when opened.

    dataset[3] is the fourth sequence as an array of `dtype`, a read-only view of the file.
    Pickling (for worker processes) carries the path alone; the files are not verified a second time.

    Raises:  DatasetError: a file is missing, or the two do not agree; names the file, expected and actual values.
    """

    path_prefix: Path
    dtype: np.dtype[Any]
    document_indices: np.ndarray
    """int64 [documents + 1], first sequence of each document."""

    def __init__(self, path_prefix: Path | str) -> None:
        self._open(Path(path_prefix), verify=True)

    def _open(self, path_prefix: Path, *, verify: bool) -> None:
        self.path_prefix = path_prefix
        self.idx_path, self.bin_path = with_suffix(path_prefix, ".idx"), with_suffix(path_prefix, ".bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DatasetError(
                    f"{path} does not exist; an indexed dataset is the two files {self.idx_path.name} and "
                    f"{self.bin_path.name}. Check the prefix, or {REMEDY}."
                )
        self.dtype, count, document_count = _read_header(self.idx_path)
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        self._lengths = np.frombuffer(index, "<i4", count, HEADER.size)
        self._offsets = np.frombuffer(index, "<i8", count, HEADER.size + 4 * count)
        self.document_indices = np.frombuffer(index, "<i8", document_count, HEADER.size + 12 * count)
        self._bin_bytes = self.bin_path.stat().st_size
        if verify:
            self._verify()
        # numpy cannot map an empty file.
        self._tokens = np.empty(0, self.dtype)
        if self._bin_bytes:
            # A plain array over the map: slicing np.memmap itself costs microseconds a sequence.
            self._tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r").view(np.ndarray)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {self.path_prefix}, which has {len(self)}")
        start = int(self._offsets[index]) // self.dtype.itemsize
        return self._tokens[start : start + int(self._lengths[index])]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 [sequences]: a copy in memory, made when it is first asked for.

        The map itself is misaligned for int32 (it begins at byte 34), which slows whole passes down. A training rank
        reads single sequences and never needs the copy: 0.3 GB for 80 million sequences.
        """
        return self._lengths.copy()

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return self._bin_bytes // self.dtype.itemsize

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, one sequence after another: a read-only view of the file, `dtype` [num_tokens]."""
        return self._tokens

    def token_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return where sequences `start` up to `stop` begin and end in `tokens`."""
        ends = [
            int(self._offsets[index]) // self.dtype.itemsize if index < len(self) else self.num_tokens
            for index in (start, stop)
        ]
        return ends[0], ends[1]

    def __getstate__(self) -> dict[str, Path]:
        return {"path_prefix": self.path_prefix}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self._open(state["path_prefix"], verify=False)

    def _verify(self) -> None:
        """Check lengths, offsets and documents in blocks, then the size of .bin."""
        itemsize, offset = self.dtype.itemsize, 0
        for start in range(0, len(self), BLOCK):
            lengths = self._lengths[start : start + BLOCK].copy()
            if int(lengths.min()) < 0:
                bad = start + int(np.argmax(lengths < 0))
                self._refuse(f"sequence {bad} has {self._lengths[bad]} tokens; a length is never negative")
            ends = offset + np.cumsum(lengths, dtype=np.int64) * itemsize
            expected = np.concatenate(([offset], ends[:-1]))
            wrong = self._offsets[start : start + BLOCK] != expected
            if wrong.any():
                at = int(np.argmax(wrong))
                self._refuse(
                    f"sequence {start + at} starts at byte {self._offsets[start + at]} by its offset, "
                    f"at {expected[at]} by the lengths before it"
                )
            offset = int(ends[-1])
        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != len(self):
            self._refuse(f"documents run from sequence {documents[0]} to {documents[-1]}, not from 0 to {len(self)}")
        for start in range(0, len(documents) - 1, BLOCK):
            block = documents[start : start + BLOCK + 1]
            if bool((block[1:] < block[:-1]).any()):
                self._refuse("documents do not follow one another in order")
        if offset != self._bin_bytes:
            raise DatasetError(
                f"{self.bin_path} is {self._bin_bytes} bytes, but its index lists {len(self)} sequences in {offset} "
                f"bytes ({self.dtype.name}): the file is cut off or altered; {REMEDY}."
            )

    def _refuse(self, what: str) -> None:
        raise DatasetError(f"{self.idx_path} is inconsistent: {what}. The file is damaged; {REMEDY}.")


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return dtype, sequences and length of the document list; the file's size is checked against both counts."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if header.startswith(LEGACY_MAGIC):
        raise DatasetError(f"{path} is in Megatron's legacy format (TNTIDX, cached/lazy); preprocess the data again.")
    if not header.startswith(MAGIC):
        raise DatasetError(
            f"{path} is not an MMIDIDX index: its first bytes are {header[:9]!r}, not {MAGIC!r}; {REMEDY}."
        )
    if len(header) < HEADER.size:
        raise DatasetError(f"{path} is {size} bytes, shorter than its {HEADER.size}-byte header; {REMEDY}.")
    _, version, code, count, document_count = HEADER.unpack(header)
    if version != VERSION:
        raise DatasetError(f"{path} has format version {version}; only version {VERSION} is known.")
    if code in FLOAT_CODES:
        raise DatasetError(f"{path} holds floating point numbers (dtype code {code}), not token ids.")
    if code not in DTYPE_OF_CODE:
        raise DatasetError(f"{path} has dtype code {code}; known are {sorted(DTYPE_OF_CODE)}; {REMEDY}.")
    if document_count < 1:
        raise DatasetError(f"{path} has an empty document list; it begins with 0 at least; {REMEDY}.")
    expected = HEADER.size + 12 * count + 8 * document_count
    if size == expected + count and count:
        raise DatasetError(f"{path} is a multimodal index (one mode byte a sequence); only text datasets are read.")
    if size != expected:
        raise DatasetError(
            f"{path} is {size} bytes, but its header announces {count} sequences and {document_count - 1} documents, "
            f"which take {expected} bytes: the file is cut off or altered; {REMEDY}."
        )
    return np.dtype(DTYPE_OF_CODE[code]), count, document_count


def with_suffix(path_prefix: Path, suffix: str) -> Path:
    """Append `suffix`; unlike `Path.with_suffix` a dot in the name stays."""
    return path_prefix.with_name(path_prefix.name + suffix)
