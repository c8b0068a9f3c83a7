"""Read arrays of `<prefix>_columns.npz` where they lie, as maps of the file.

A dataset of 80 million examples has 80 MB to 320 MB a column and 640 MB of documents: none of it is copied into memory,
and pages are read when they are looked at.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from megatron_xmtf.errors import DatasetError

__all__ = ["read_column"]

LOCAL_HEADER_BYTES = 30
"""Fixed part of the header before each member of a zip file; two lengths at its end say what follows."""


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
