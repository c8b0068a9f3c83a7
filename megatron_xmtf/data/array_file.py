"""Arrays in .npy files, written so that a disk which refuses them says why.

`np.save` writes through the C library's streams: of a full disk it says that fewer numbers were written than asked,
and not that the disk is full. A map of a file with holes (`open_memmap`) dies of SIGBUS there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["map_new_array", "save_array"]


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array of numbers as `np.save` does, byte for byte.

    Raises:  OSError: as the file system says.
    """
    assert not array.dtype.hasobject, "objects would be pickled"
    # Buffered: numpy writes the header without a look at how much of it was written.
    with open(path, "wb") as stream:
        # Byte by byte what `np.save` chooses for plain numbers: version 1.0, rows first.
        array = np.ascontiguousarray(array)
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(array.reshape(-1).view(np.uint8).data)


def map_new_array(path: Path, dtype: DTypeLike, shape: Sequence[int]) -> np.memmap[Any, Any]:
    """Map a new array of zeros whose disk space is taken at once.

    Raises:  OSError: no space for all of it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=tuple(shape))
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, path.stat().st_size)
    finally:
        os.close(descriptor)
    return array
