"""What a checkpoint can be made of: named tensors, any rows of them, opened by several processes at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES, row_ranges
from megatron_xmtf.conversion.huggingface_model import dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter

__all__ = ["SourceTensor", "TensorSource", "common_dtype", "matched_tensor"]

Opened = TypeVar("Opened", bound="TensorSource")


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the checkpoint to be."""

    name: str
    shape: tuple[int, ...]
    """As it is stored, with padded rows."""
    dtype: torch.dtype
    chunks: tuple[tuple[int, int], ...]
    """Rows [first, last) that are read and stored together, one after the other; all rows. A scalar is one row."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all rows as they are stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def box(self, first: int, last: int) -> tuple[torch.Size, torch.Size]:
        """Return where rows [first, last) begin in the tensor, and their shape."""
        if not self.shape:
            return torch.Size(()), torch.Size(())
        return torch.Size((first, *(0 for _ in self.shape[1:]))), torch.Size((last - first, *self.shape[1:]))


class TensorSource(ABC):
    """An opened source; a context manager."""

    tensors: Sequence[SourceTensor]
    """All tensors, in the order in which they are stored; the same in every process."""

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """What it reads, to tell whether an interrupted conversion goes on from the same."""

    @abstractmethod
    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return rows [first, last) in the type they are stored in, on the CPU; padding is zeros.

        Raises:  NonFiniteError, CorruptCheckpointError: name file and tensor.
        """

    def files_to_check(self, name: str) -> Sequence[Path]:
        """Return the files of a tensor that hold checksums: `check` is called for each once, in any process."""
        return ()

    def check(self, path: Path) -> None:
        """Compare all bytes of a file with the checksums that it holds.

        Raises:  CorruptCheckpointError: names file and tensor.
        """
        raise AssertionError(f"{path} has no checksums")

    def take_notes(self) -> Mapping[str, float]:
        """Return what was noticed since the last call: a name -> a number, the largest of which counts."""
        return {}

    def close(self) -> None:
        """Let go of what is open."""
        return None

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def common_dtype(tensors: Sequence[SourceTensor]) -> str:
    """Return the type of all tensors, `mixed` where they differ."""
    types = {dtype_name(tensor.dtype) for tensor in tensors}
    return types.pop() if len(types) == 1 else "mixed"


def matched_tensor(
    parameter: MatchedParameter, dtype: torch.dtype, *, read_as: torch.dtype | None = None
) -> SourceTensor:
    """Return how a parameter is stored: whole groups together where one fits, then the padded rows.

    Args:  dtype: as it is stored. read_as: as the source has it, where chunks are to be small in both types.
    """
    rows, padded = parameter.shape[0], parameter.padded_shape[0]
    itemsize = max(dtype.itemsize, 0 if read_as is None else read_as.itemsize)
    row_bytes = torch.Size(parameter.shape[1:]).numel() * itemsize

    def chunks() -> Iterator[tuple[int, int]]:
        yield from parameter.row_ranges(row_bytes, chunk_bytes=CHUNK_BYTES)
        for first, last in row_ranges(padded - rows, row_bytes, chunk_bytes=CHUNK_BYTES):
            yield rows + first, rows + last

    return SourceTensor(parameter.ours, parameter.padded_shape, dtype, tuple(chunks()))
