"""fp32 weights out of the flat partitions that ZeRO and BF16_Optimizer write, one a data-parallel rank.

    parameters of a stage, flattened in a row    aaaaaaaa bbb cccccc -
    partitions of three ranks                    aaaaaa | aabbbc | ccccc-       the end is padding
    param_slice_mappings of rank 1               a: start 0, numel 2    b: start 2, numel 3    c: start 5, numel 1

Half-precision weights are rounded copies of these. File MM of a model-parallel rank belongs to pipeline stage
MM // tensor-parallel size and tensor-parallel rank MM % tensor-parallel size.
Source:  BF16_Optimizer of DeepSpeed 0.7.1, PipelineParallelGrid.get_model_parallel_rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.conversion.deepspeed_layout import ZERO_FILE
from megatron_xmtf.conversion.deepspeed_slices import Slice, SliceSource
from megatron_xmtf.conversion.torch_file import StandIn, fields_of, open_torch_file
from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError, MissingError

__all__ = ["ZeroFiles"]


class ZeroFiles(SliceSource):
    """The flat partitions of fp32 weights that ZeRO and BF16_Optimizer write beside the layer files.

    Args:    tensor_parallel_size: that of the layer files.
    Raises:  CheckpointError: no such files, one missing, or written by a DeepSpeed that does not say which stretch is
             which parameter (before 0.7.0; ZeRO stages 1 and 2 before 0.7.4).
    """

    def __init__(self, directory: Path, *, tensor_parallel_size: int) -> None:
        self.directory, self.tensor_parallel_size = directory, tensor_parallel_size
        self._grid: dict[tuple[int, int], Path] = {}
        for path in sorted(directory.iterdir()):
            match = ZERO_FILE.fullmatch(path.name)
            if match is not None:
                self._grid[int(match[2]), int(match[1])] = path
        self._check_grid()
        self._data_parallel_size = 1 + max(rank for _, rank in self._grid)
        self._opened: tuple[int, list[list[_Partition]]] | None = None
        self._stages: dict[str, int] = {}
        self.names = {}
        for stage in range((1 + max(model for model, _ in self._grid)) // tensor_parallel_size):
            for partition in self._open(stage)[0]:
                for name in partition.places:
                    # The embedding is tied: the last stage holds a copy of it under the same name.
                    self._stages.setdefault(name, stage)
                    self.names.setdefault(name, partition.path)

    def slices(self, name: str) -> list[Slice]:
        """Return its slices, as `SliceSource.slices`."""
        found = []
        for partitions in self._open(self._stages[name]):
            holding = [partition for partition in partitions if name in partition.places]
            if not holding:
                raise CorruptCheckpointError(f"{partitions[0].path} and its data-parallel siblings hold no {name}.")
            found.append(Slice(tuple(part.stretch(name) for part in holding), holding[0].path, is_flat=True))
        return found

    def files_of(self, name: str) -> list[Path]:
        """Return the files of its stage, as `SliceSource.files_of`."""
        return [self._grid[model, rank] for model in self._models(self._stages[name]) for rank in self._ranks()]

    def _models(self, stage: int) -> range:
        return range(stage * self.tensor_parallel_size, (stage + 1) * self.tensor_parallel_size)

    def _ranks(self) -> range:
        return range(self._data_parallel_size)

    def _open(self, stage: int) -> list[list[_Partition]]:
        """Open a stage: partitions by tensor-parallel rank and data-parallel rank."""
        if self._opened is not None and self._opened[0] == stage:
            return self._opened[1]
        self._opened = None
        opened = [[_Partition(self._grid[model, rank]) for rank in self._ranks()] for model in self._models(stage)]
        self._opened = (stage, opened)
        return opened

    def _check_grid(self) -> None:
        if not self._grid:
            raise MissingError(
                f"{self.directory} holds no (bf16_)zero_pp_rank_D_mp_rank_MM_optim_states.pt: there are no fp32 "
                "weights. Import what the layer files hold with --weights stored."
            )
        models, ranks = (1 + max(axis) for axis in zip(*self._grid, strict=True))
        missing = [(m, d) for m in range(models) for d in range(ranks) if (m, d) not in self._grid]
        if missing or models % self.tensor_parallel_size:
            names = [f"..._pp_rank_{rank}_mp_rank_{model:02d}_optim_states.pt" for model, rank in missing[:5]]
            raise MissingError(
                f"{self.directory}: the optimizer files of {models} model-parallel and {ranks} data-parallel ranks "
                f"are not whole at tensor-parallel size {self.tensor_parallel_size}: "
                f"{', '.join(names) or 'the sizes do not divide'}. Get the whole checkpoint."
            )


class _Partition:
    """One rank's flat fp32 weights and where each parameter lies in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        value = open_torch_file(path, check=False)
        state = value.get("optimizer_state_dict") if isinstance(value, dict) else None
        mappings = state.get("param_slice_mappings") if isinstance(state, dict) else None
        groups = state.get("single_partition_of_fp32_groups") if isinstance(state, dict) else None
        if not isinstance(mappings, list) or not isinstance(groups, list) or len(mappings) != len(groups):
            raise CheckpointError(
                f"{path} does not say which of its fp32 weights is which parameter (`param_slice_mappings`): "
                "DeepSpeed before 0.7.0 (0.7.4 for ZeRO) wrote it. Import the layer files with --weights stored."
            )
        self._groups = [self._flat(group) for group in groups]
        self.places: dict[str, tuple[int, int, int]] = {}
        for number, mapping in enumerate(mappings):
            for name, address in mapping.items() if isinstance(mapping, dict) else ():
                self.places[str(name)] = (number, *self._address(name, address, self._groups[number].numel()))

    def stretch(self, name: str) -> torch.Tensor:
        """Return this rank's stretch of a parameter, flat."""
        group, start, numel = self.places[name]
        return self._groups[group][start : start + numel]

    def _flat(self, group: Any) -> torch.Tensor:
        if not isinstance(group, torch.Tensor) or group.dim() != 1:
            raise CorruptCheckpointError(f"{self.path}: single_partition_of_fp32_groups holds no flat tensors.")
        return group.detach()

    def _address(self, name: object, address: Any, length: int) -> tuple[int, int]:
        fields = fields_of(address) if isinstance(address, StandIn) else {}
        start, numel = fields.get("start"), fields.get("numel")
        if not isinstance(start, int) or not isinstance(numel, int) or not 0 <= start <= start + numel <= length:
            raise CorruptCheckpointError(
                f"{self.path}: {name} is said to be {numel} numbers from {start} of a partition of {length}."
            )
        return start, numel
