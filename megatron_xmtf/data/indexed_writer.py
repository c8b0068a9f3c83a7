"""Write Megatron's memory-mapped token files; their layout is in `data.indexed_dataset`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_xmtf.data.indexed_dataset import BLOCK, CODE_OF_DTYPE, HEADER, MAGIC, VERSION, with_suffix
from megatron_xmtf.data.part_file import PartFile, WrittenFile
from megatron_xmtf.errors import DatasetError
from megatron_xmtf.files import TEMPORARY_MARK, atomic_write

__all__ = ["IndexedDatasetWriter"]

INT32_MAX = 2**31 - 1
PART_MARK = TEMPORARY_MARK + "part"


class IndexedDatasetWriter:
    """Write `<path_prefix>.bin` and `.idx`; a context manager. Neither name exists until everything is written.

    with IndexedDatasetWriter("data/train_text_document", dtype=token_dtype(vocab_size)) as writer:
        writer.add(np.array([5, 6, 7, 8]), np.array([3, 1]))     # two sequences: [5, 6, 7] and [8]
    writer.files                                                 # {".bin": WrittenFile, ".idx": WrittenFile}

    Until then everything is in part files, lengths too: memory does not grow with the data.

        .bin.tmp-part  ids    .lengths.tmp-part  i32 a sequence    .documents.tmp-part  i32 a document, where given
    """

    def __init__(
        self,
        path_prefix: Path | str,
        *,
        dtype: np.dtype[Any],
        keep_parts: bool = False,
        resume: Mapping[str, WrittenFile] | None = None,
    ) -> None:
        """Args: keep_parts: leave the part files to the caller, after an error and after the end.

        resume: what `sync` returned in a run whose parts were kept; goes on from there.

        Raises:  DatasetError: `dtype` is none of token ids, or the parts are not what `resume` says.
        """
        self.path_prefix = Path(path_prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            raise DatasetError(f"token ids cannot be stored as {self.dtype.name}; use uint16 or int32.")
        self.files: dict[str, WrittenFile] = {}
        self._keep_parts = keep_parts
        self._parts: dict[str, PartFile] = {}
        if resume is not None and not self._part(".bin").exists() and self._final(".bin").exists():
            os.replace(self._final(".bin"), self._part(".bin"))  # killed while finishing
        try:
            for suffix in resume or (".bin", ".lengths"):
                self._parts[suffix] = PartFile(self._part(suffix), written=resume[suffix] if resume else None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()
            if not self._keep_parts:
                for suffix in self._parts:
                    self._part(suffix).unlink(missing_ok=True)

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._parts[".bin"].num_bytes // self.dtype.itemsize

    def add(self, tokens: np.ndarray, lengths: np.ndarray, *, document_lengths: np.ndarray | None = None) -> None:
        """Append sequences.

        Args:    tokens: integers [sum(lengths)], the sequences one after another.
                 lengths: integers [sequences], tokens of each. document_lengths: integers [documents], sequences
                 of each document, given always or never; by default every sequence is a document.
        Raises:  DatasetError: an id that `dtype` cannot hold.
        """
        assert int(lengths.sum()) == len(tokens), "lengths do not add up to the tokens given"
        if len(tokens) and tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                raise DatasetError(
                    f"token ids from {low} to {high} do not fit {self.dtype.name} ({limits.min} to {limits.max}); "
                    "the vocabulary size given is not that of the tokenizer."
                )
        if len(lengths) and int(lengths.max()) > INT32_MAX:
            raise DatasetError(f"a sequence has {int(lengths.max())} tokens; the format holds at most {INT32_MAX}.")
        if document_lengths is not None:
            assert int(document_lengths.sum()) == len(lengths), "documents do not add up"
            if ".documents" not in self._parts and not self._parts[".lengths"].num_bytes:
                self._parts[".documents"] = PartFile(self._part(".documents"))
            self._parts[".documents"].write(_raw_bytes(document_lengths.astype("<i4")))
        else:
            assert ".documents" not in self._parts, "documents are given for some sequences only"
        self._parts[".bin"].write(_raw_bytes(np.ascontiguousarray(tokens, dtype=self.dtype)))
        self._parts[".lengths"].write(_raw_bytes(lengths.astype("<i4")))

    def sync(self) -> dict[str, WrittenFile]:
        """Bring everything to the disk; return what `resume` takes."""
        return {suffix: part.sync() for suffix, part in self._parts.items()}

    def length_blocks(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each sequence so far, int32, `BLOCK` sequences at a time."""
        return _read_blocks(self._part(".lengths"))

    def finish(self) -> None:
        """Write the index, give both files their names."""
        self.files[".bin"] = self._parts[".bin"].sync()
        self.close()
        os.replace(self._part(".bin"), self._final(".bin"))
        self.files[".idx"] = self._write_index()

    def close(self) -> None:
        """Close the part files; what was not finished stays in them."""
        for part in self._parts.values():
            part.close()

    def _write_index(self) -> WrittenFile:
        """Write the .idx out of the part files, in blocks."""
        count = self._parts[".lengths"].num_bytes // 4
        grouped = ".documents" in self._parts
        document_count = self._parts[".documents"].num_bytes // 4 if grouped else count

        def documents() -> Iterator[np.ndarray]:
            if grouped:
                yield from _read_blocks(self._part(".documents"))
            else:
                yield from (np.ones(min(BLOCK, count - start), "<i4") for start in range(0, count, BLOCK))

        digest, size = hashlib.sha256(), 0
        with atomic_write(self._final(".idx"), "wb") as stream:
            for part in chain(
                [HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], count, document_count + 1)],
                map(_raw_bytes, self.length_blocks()),
                map(_raw_bytes, _exclusive_sums(self.length_blocks(), self.dtype.itemsize)),
                map(_raw_bytes, _exclusive_sums(documents(), 1)),
                [count.to_bytes(8, "little")],
            ):
                stream.write(part)
                digest.update(part)
                size += len(part)
        return WrittenFile(size, digest.hexdigest())

    def _part(self, suffix: str) -> Path:
        return with_suffix(self.path_prefix, suffix + PART_MARK)

    def _final(self, suffix: str) -> Path:
        return with_suffix(self.path_prefix, suffix)


def _raw_bytes(array: np.ndarray) -> memoryview | bytes:
    """Return the memory of a contiguous array without a copy; an empty one cannot be cast."""
    return array.data.cast("B") if array.size else b""


def _read_blocks(path: Path) -> Iterator[np.ndarray]:
    """Yield the int32 of a file, `BLOCK` at a time."""
    with open(path, "rb") as stream:
        while len(block := np.frombuffer(stream.read(4 * BLOCK), "<i4")):
            yield block


def _exclusive_sums(blocks: Iterable[np.ndarray], scale: int) -> Iterator[np.ndarray]:
    """Yield, for values v0, v1 ... in blocks, the int64 0, v0, v0 + v1 ... times `scale`, the total left out."""
    total = 0
    for block in blocks:
        sums = np.cumsum(block, dtype="<i8") * scale
        yield total + np.concatenate((np.zeros(1, "<i8"), sums[:-1]))
        total += int(sums[-1])
