"""What is known of each example: collected in a part file, packed into `<prefix>_columns.npz`, mapped when read.

    while writing   one row an example: u32 x 7 columns, u64 document            36 bytes
    .npz            dataset.npy  u1 | u2 | u4 [examples], ..., document.npy  u8  the smallest type, not compressed

A dataset of 80 million examples has 80 MB to 320 MB a column and 640 MB of documents: none of it is copied into memory,
and pages are read when they are looked at.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_xmtf.data.dataset_manifest import COLUMNS, DOCUMENTS
from megatron_xmtf.errors import DatasetError

__all__ = ["ColumnNames", "read_column", "row_type", "write_columns"]

BLOCK_ROWS = 1 << 20
"""Rows packed at a time: 36 MiB."""

LOCAL_HEADER_BYTES = 30
"""Fixed part of the header before each member of a zip file; two lengths at its end say what follows."""


class ColumnNames:
    """Names of one column in the order of their first appearance; a small integer stands for each."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Args: names: of an interrupted run."""
        self.names = list(names)
        self._code_of = {name: code for code, name in enumerate(names)}

    def codes(self, names: Sequence[str], indices: np.ndarray) -> np.ndarray:
        """Return the integer of `names[index]` for each index, uint32; names that no index uses are not taken over."""
        used, first = np.unique(indices, return_index=True)
        table = np.zeros(len(names), np.uint32)
        for index in used[np.argsort(first)]:
            name = names[int(index)]
            if name not in self._code_of:
                self._code_of[name] = len(self.names)
                self.names.append(name)
            table[index] = self._code_of[name]
        return table[indices]

    @property
    def says_something(self) -> bool:
        """Whether any example has a name that is not empty."""
        return self.names not in ([], [""])


def row_type(*, with_documents: bool) -> np.dtype[Any]:
    """Return the type of a row of the part file."""
    return np.dtype([(name, "<u4") for name in COLUMNS] + [(DOCUMENTS, "<u8")] * with_documents)


def write_columns(
    stream: IO[bytes], rows: Path, *, columns: Mapping[str, ColumnNames], with_documents: bool
) -> dict[str, list[int]]:
    """Pack the columns that say something, and the documents, into an .npz; return the examples of each name.

    Args:    rows: the part file, of `row_type`. columns: by name.
    """
    dtype = row_type(with_documents=with_documents)
    count = rows.stat().st_size // dtype.itemsize
    counts = {}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in [*columns, *[DOCUMENTS] * with_documents]:
            total = np.zeros(0 if name == DOCUMENTS else len(columns[name].names), np.int64)
            small = np.dtype("<u8") if name == DOCUMENTS else np.min_scalar_type(max(len(total) - 1, 0))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(small), "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(member, header)
                for block in _row_blocks(rows, dtype):
                    member.write(block[name].astype(small).tobytes())
                    if name != DOCUMENTS:
                        total += np.bincount(block[name], minlength=len(total))
            counts[name] = total.tolist()
    return counts


def _row_blocks(path: Path, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    with open(path, "rb") as stream:
        while len(block := np.frombuffer(stream.read(BLOCK_ROWS * dtype.itemsize), dtype)):
            yield block


def read_column(path: Path, name: str, *, count: int) -> np.ndarray:
    """Return unsigned integers [count] out of an .npz, read-only; headers are checked before anything is allocated.

    A member that was stored as it is (so `ExampleDatasetWriter` does) is mapped, a compressed one is read.

    Raises:  DatasetError: damaged, no such array, or not unsigned integers [count].
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                if version != (1, 0):
                    raise ValueError(f"npy version {version}")
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                if shape != (count,) or dtype.kind != "u":
                    raise ValueError(f"column {name!r} is {dtype} {list(shape)}, not unsigned [{count}]")
                header_bytes = stream.tell()
                if member.file_size != header_bytes + count * dtype.itemsize:
                    raise ValueError(f"column {name!r} takes {member.file_size} bytes, not what its shape says")
                if member.compress_type != zipfile.ZIP_STORED or not count:
                    return np.frombuffer(stream.read(count * dtype.itemsize), dtype, count)
        offset = _data_offset(path, member) + header_bytes
        return np.memmap(path, dtype, "r", offset=offset, shape=(count,)).view(np.ndarray)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}; preprocess the records again.") from error


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin: behind its local header, whose length is its own."""
    with open(path, "rb") as stream:
        stream.seek(member.header_offset)
        header = stream.read(LOCAL_HEADER_BYTES)
    names_bytes, extra_bytes = header[26:28], header[28:30]
    offset = int.from_bytes(names_bytes, "little") + int.from_bytes(extra_bytes, "little")
    return member.header_offset + LOCAL_HEADER_BYTES + offset
