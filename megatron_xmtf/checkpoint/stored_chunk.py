"""One chunk of a tensor in a torch_dist file: described without its numbers, then read a few rows at a time.

A chunk is what `torch.save` writes of one tensor: a zip archive with a pickle and the numbers, uncompressed.

    __0_0.distcp   | chunk | chunk | data.pkl  ...  data/0: row 0, row 1, row 2 ...  | chunk |
                                                            ^ rows [1, 3) are read from here alone

A checkpoint of a training may hold the embedding of 250,880 words in one chunk of 7 GB; whoever needs some rows of it
reads these. The pickle goes through torch's restricted loader, with storages that are reserved and never filled.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_xmtf.errors import CorruptCheckpointError

__all__ = ["DAMAGE", "ReadInto", "SeeNumbers", "StoredChunk", "load_restricted"]

ReadInto = Callable[[memoryview, int], int]
"""Fills a buffer of bytes from a place of a file; gives the bytes read, fewer only at the file's end."""
SeeNumbers = Callable[[torch.Tensor], object]
"""Is shown the numbers that are read while they are at hand: tensors of any shape, in the type they are stored in."""

DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError, struct.error),
)
"""What restricted loaders of pickles raise at damaged bytes, besides `UnpicklingError`: they pop from empty stacks."""


@dataclass(frozen=True)
class StoredChunk:
    """Where the numbers of one chunk are."""

    what: str
    """File and tensor, for messages."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None
    """Byte of the file where they begin; None: they do not lie in one piece and are read whole."""

    @classmethod
    def find(cls, stream: io.IOBase, *, offset: int, length: int, what: str) -> StoredChunk:
        """Describe the chunk in bytes [offset, offset + length) of an opened file.

        Raises:  CorruptCheckpointError: damaged, or it holds anything but a tensor.
        """
        view = _create_file_view(stream, offset, length)
        with torch.serialization.skip_data():
            tensor = load_restricted(view, what)
        if not isinstance(tensor, torch.Tensor):
            raise CorruptCheckpointError(f"{what} is a {type(tensor).__name__} instead of a tensor; it is damaged.")
        shape, dtype = tuple(tensor.shape), tensor.dtype
        in_one_piece = (
            tensor.layout == torch.strided
            and tensor.is_contiguous()
            and tensor.storage_offset() == 0
            and tensor.untyped_storage().nbytes() == tensor.nbytes
        )
        place = None
        if in_one_piece and tensor.nbytes:
            place = _record_offset(view, what, wanted=tensor.nbytes, length=length)
        return cls(what, shape, dtype, None if place is None else offset + place)

    def read_rows(
        self, read_into: ReadInto, rows: tuple[int, int], *, inner: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Return rows [first, last) along the first dimension; memory of these alone.

        Args:    read_into: of the file. inner: of one row, what is wanted along the second dimension: rows of one of
                 the stacked layers.
        Raises:  CorruptCheckpointError: the file ends before them.
        """
        assert self.offset is not None, "read whole"
        first, last = rows
        lead: tuple[int, ...] = ()
        rest = self.shape[1:]
        if inner is not None:
            assert last - first == 1, "rows of one row"
            first, last, lead = first * rest[0] + inner[0], first * rest[0] + inner[1], (1,)
            rest = rest[1:]
        row_bytes = self.dtype.itemsize * math.prod(rest)
        data = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        try:
            left = len(data) - read_into(data.numpy().data, self.offset + first * row_bytes)
        except OSError as error:  # the disk refuses to read a file that is there
            raise CorruptCheckpointError(f"{self.what} cannot be read: {error}.") from error
        if left:
            raise CorruptCheckpointError(f"{self.what} ends {left:,} bytes early; the checkpoint is damaged.")
        return data.view(self.dtype).view(*lead, last - first, *rest)


def _record_offset(view: Any, what: str, *, wanted: int, length: int) -> int | None:
    """Return where the numbers begin within the archive; None: this archive keeps them in another way."""
    view.seek(0)
    try:
        archive: Any = torch._C.PyTorchFileReader(view)
        records: Sequence[str] = archive.get_all_records()
        if [name for name in records if name.startswith("data/")] != ["data/0"]:
            return None
        place = int(archive.get_record_offset("data/0"))
    except RuntimeError as error:
        raise CorruptCheckpointError(f"{what} is damaged: {str(error).splitlines()[0]}.") from error
    if place < 0 or place + wanted > length:
        raise CorruptCheckpointError(f"{what} is damaged: its numbers reach beyond its end.")
    return place


def load_restricted(stream: Any, what: Path | str) -> Any:
    """Load with `weights_only`; never a second try without it.

    Raises:  CorruptCheckpointError: damaged, or it holds anything but tensors and plain data.
    """
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        named = next((line.strip() for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
        raise CorruptCheckpointError(
            f"{what} is refused: it holds more than tensors and plain data ({named}). Get it from a source you trust."
        ) from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptCheckpointError(f"{what} is damaged: {reason}.") from error
