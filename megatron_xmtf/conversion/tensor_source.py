"""What a checkpoint can be made of: named tensors, any rows of them, opened by several processes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_xmtf.checkpoint.streamed_write import CHUNK_BYTES, row_ranges
from megatron_xmtf.conversion.mapping import MatchedParameter

__all__ = ["SourceTensor", "TensorSource", "matched_tensor"]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the checkpoint to be."""

    name: str
    shape: tuple[int, ...]
    """As it is stored, with padded rows."""
    dtype: torch.dtype
    chunks: tuple[tuple[int, int], ...]
    """Rows [first, last) that are read and stored together, one after the other; all rows."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all rows as they are stored."""
        return self.shape[0] * self.row_bytes


class TensorSource(Protocol):
    """An opened source; a context manager."""

    @property
    def tensors(self) -> Sequence[SourceTensor]:
        """All tensors, in the order in which they are stored; the same in every process."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """What it reads, to tell whether an interrupted conversion goes on from the same."""
        ...

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return rows [first, last) in the type they are stored in, on the CPU; padding is zeros.

        Raises:  NonFiniteError, CorruptCheckpointError: name file and tensor.
        """
        ...

    def __enter__(self) -> TensorSource: ...

    def __exit__(self, *error: Any) -> None: ...


def matched_tensor(parameter: MatchedParameter, dtype: torch.dtype) -> SourceTensor:
    """Return how a parameter is stored: whole groups together where one fits, then the padded rows."""
    rows, padded = parameter.shape[0], parameter.padded_shape[0]
    row_bytes = torch.Size(parameter.shape[1:]).numel() * dtype.itemsize

    def chunks() -> Iterator[tuple[int, int]]:
        yield from parameter.row_ranges(row_bytes, chunk_bytes=CHUNK_BYTES)
        for first, last in row_ranges(padded - rows, row_bytes, chunk_bytes=CHUNK_BYTES):
            yield rows + first, rows + last

    return SourceTensor(parameter.ours, parameter.padded_shape, dtype, tuple(chunks()))
