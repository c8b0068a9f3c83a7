"""Tensor-parallel slices of every parameter out of Megatron-DeepSpeed's files, some rows at a time.

    source           one file holds                                      slices of a parameter
    LayerFiles       a layer of one tensor-parallel rank                 one tensor a rank
    UniversalFiles   a whole parameter                                   one
    FragmentFiles    a stretch of a rank's slice, flattened              stretches of all data-parallel ranks in a row
    `deepspeed_zero` a flat partition of many parameters of a rank       stretches cut out of the partitions

Files are opened in turn, memory-mapped; what was opened before is let go.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_xmtf.conversion.deepspeed_layout import LAYER_FILE, parameter_name
from megatron_xmtf.conversion.torch_file import open_torch_file
from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError, MissingError

__all__ = ["FragmentFiles", "LayerFiles", "Slice", "SliceSource", "UniversalFiles"]


@dataclass(frozen=True)
class Slice:
    """One tensor-parallel rank's part of a parameter."""

    stretches: tuple[torch.Tensor, ...]
    """The slice itself, or flattened stretches that follow each other."""
    file: Path
    """Where it begins, for messages."""
    is_flat: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Type that it is stored in."""
        return self.stretches[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice; of stretches their length together."""
        if self.is_flat:
            return (sum(stretch.numel() for stretch in self.stretches),)
        return tuple(self.stretches[0].shape)

    def rows(self, start: int, end: int, *, shape: Sequence[int]) -> torch.Tensor:
        """Return rows [start, end) of the slice.

        Args:  shape: of the slice; stretches do not know it.
        """
        if not self.is_flat:
            return self.stretches[0][start:end]
        row = math.prod(shape[1:])
        result = torch.empty((end - start, *shape[1:]), dtype=self.dtype)
        target, begin = result.view(-1), 0
        for stretch in self.stretches:
            low, high = max(begin, start * row), min(begin + stretch.numel(), end * row)
            if low < high:
                target[low - start * row : high - start * row] = stretch[low - begin : high - begin]
            begin += stretch.numel()
        return result


class SliceSource(ABC):
    """Where slices come from."""

    tensor_parallel_size: int
    """Number of slices of each parameter."""
    names: dict[str, Path]
    """Parameter -> the first file that holds it."""

    @abstractmethod
    def slices(self, name: str) -> list[Slice]:
        """Return a parameter's slices, by tensor-parallel rank; those of another parameter may be let go.

        Nothing is compared with its checksum; `files_of` names the files where all must be (`torch_file.check_bytes`).

        Raises:  CorruptCheckpointError: a file is damaged, or does not hold it.
        """

    @abstractmethod
    def files_of(self, name: str) -> list[Path]:
        """Return the files that are opened for a parameter."""


class LayerFiles(SliceSource):
    """The layer files of a step.

    Raises:  CheckpointError: a file or a tensor-parallel part of one is missing, or there twice; all are named.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._grid = _layer_grid(directory)
        self.tensor_parallel_size = 1 + max(rank for _, rank in self._grid)
        self._check_grid()
        self._opened: tuple[int, list[dict[str, torch.Tensor]]] | None = None
        self.names = {}
        for layer in sorted({layer for layer, _ in self._grid}):
            for key in self._open(layer)[0]:
                self.names[parameter_name(layer, key)] = self._grid[layer, 0]

    def slices(self, name: str) -> list[Slice]:
        """Return its slices, as `SliceSource.slices`."""
        layer, key = self._place(name)
        opened = self._open(layer)
        return [Slice((tensors[key],), self._grid[layer, rank]) for rank, tensors in enumerate(opened)]

    def files_of(self, name: str) -> list[Path]:
        """Return the files of its layer, as `SliceSource.files_of`."""
        return [self._grid[self._place(name)[0], rank] for rank in range(self.tensor_parallel_size)]

    def _place(self, name: str) -> tuple[int, str]:
        """Return layer and key of `3.mlp.dense_h_to_4h.bias` and of `tied_modules.embed.word_embeddings.weight`."""
        first, _, key = name.partition(".")
        return (int(first), key) if first.isdigit() else (1, key.partition(".")[2])

    def _open(self, layer: int) -> list[dict[str, torch.Tensor]]:
        if self._opened is not None and self._opened[0] == layer:
            return self._opened[1]
        self._opened = None
        opened: list[dict[str, torch.Tensor]] = []
        for rank in range(self.tensor_parallel_size):
            path = self._grid[layer, rank]
            tensors = open_torch_file(path, check=False)
            if not isinstance(tensors, dict) or not all(isinstance(item, torch.Tensor) for item in tensors.values()):
                raise CorruptCheckpointError(f"{path} is not a flat dictionary of tensors.")
            differing = sorted(set(tensors) ^ set(opened[0])) if opened else []
            if differing:
                raise CheckpointError(
                    f"{path} and {self._grid[layer, 0].name} do not hold the same tensors: {', '.join(differing[:5])}."
                )
            opened.append(tensors)
        self._opened = (layer, opened)
        return opened

    def _check_grid(self) -> None:
        layers = {layer for layer, _ in self._grid}
        wanted = {(layer, rank) for layer in layers for rank in range(self.tensor_parallel_size)}
        missing = sorted(wanted - set(self._grid))
        if missing:
            names = [f"layer_{layer:02d}-model_{rank:02d}-model_states.pt" for layer, rank in missing]
            raise MissingError(
                f"{self.directory}: {len(names)} files of {self.tensor_parallel_size} tensor-parallel ranks are "
                f"missing: {', '.join(names[:5])}. Get the whole checkpoint."
            )


def _layer_grid(directory: Path) -> dict[tuple[int, int], Path]:
    grid: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.iterdir()):
        match = LAYER_FILE.fullmatch(path.name)
        if match is None:
            continue
        place = (int(match[1]), int(match[2]))
        if place in grid:
            raise CheckpointError(f"{directory}: {grid[place].name} and {path.name} are one layer's part twice.")
        grid[place] = path
    return grid


class UniversalFiles(SliceSource):
    """The parameters of a universal checkpoint: zero/<parameter>/fp32.pt."""

    tensor_parallel_size = 1

    def __init__(self, directory: Path) -> None:
        self.names = {path.name: path / "fp32.pt" for path in sorted((directory / "zero").iterdir()) if path.is_dir()}

    def slices(self, name: str) -> list[Slice]:
        """Return its slices, as `SliceSource.slices`."""
        path = self.names[name]
        value = open_torch_file(path, check=False)
        # Newer versions of DeepSpeed write the tensor alone for what they copy.
        tensor = value.get("param") if isinstance(value, dict) else value
        if not isinstance(tensor, torch.Tensor):
            raise CorruptCheckpointError(f"{path} holds no tensor `param`.")
        return [Slice((tensor,), path)]

    def files_of(self, name: str) -> list[Path]:
        """Return its file, as `SliceSource.files_of`."""
        return [self.names[name]]


class FragmentFiles(SliceSource):
    """What ds_to_universal.py cuts out first: tmp/<parameter>/<tp>/fp32.<dp>, any number of data-parallel ranks.

    Raises:  CheckpointError: parameters with differing numbers of tensor-parallel ranks, or a gap in them.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, list[list[Path]]] = {}
        for parameter in sorted(path for path in (directory / "tmp").iterdir() if path.is_dir()):
            ranks = {int(path.name): path for path in parameter.iterdir() if path.name.isdigit()}
            if sorted(ranks) != list(range(len(ranks))) or not ranks:
                raise CheckpointError(f"{parameter} has the tensor-parallel ranks {sorted(ranks)}: some are missing.")
            self._files[parameter.name] = [_numbered(ranks[rank], "fp32") for rank in range(len(ranks))]
        counts = {len(ranks) for ranks in self._files.values()}
        if len(counts) != 1:
            raise CheckpointError(f"{directory / 'tmp'}: parameters of {sorted(counts)} tensor-parallel ranks.")
        self.tensor_parallel_size = counts.pop()
        self.names = {name: ranks[0][0] for name, ranks in self._files.items()}

    def slices(self, name: str) -> list[Slice]:
        """Return its slices, as `SliceSource.slices`."""
        found = []
        for files in self._files[name]:
            stretches = tuple(open_torch_file(path, check=False) for path in files)
            for path, stretch in zip(files, stretches, strict=True):
                if not isinstance(stretch, torch.Tensor) or stretch.dim() != 1:
                    raise CorruptCheckpointError(f"{path} is no stretch of a flattened parameter.")
            found.append(Slice(stretches, files[0], is_flat=True))
        return found

    def files_of(self, name: str) -> list[Path]:
        """Return the files of all ranks, as `SliceSource.files_of`."""
        return [path for files in self._files[name] for path in files]


def _numbered(directory: Path, state: str) -> list[Path]:
    """Return `fp32.00`, `fp32.01` ... `fp32.10` in the order of their numbers."""
    found = {}
    for path in directory.iterdir():
        match = re.fullmatch(rf"{state}\.(\d+)", path.name)
        if match is not None:
            found[int(match[1])] = path
    if not found:
        raise MissingError(f"{directory} holds no {state}.00: the parameter's fp32 values are missing.")
    numbers = sorted(found)
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise MissingError(f"{directory}: of {state} there are the data-parallel ranks {numbers}; some are missing.")
    return [found[number] for number in numbers]
