"""Megatron-DeepSpeed's slices of a BLOOM as the tensors of a checkpoint: matched, put together, a few rows at a time.

    tensor-parallel slices (`deepspeed_slices`)    rule by the parameter's split (`mapping`)
    QKV, h_to_4h with biases, embedding            one below the other
    dense.weight, 4h_to_h.weight                   side by side
    LayerNorms, dense.bias, 4h_to_h.bias           copies: `replicas`

Rows of QKV are [heads, 3, head_dim] on all sides.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
from megatron_xmtf.conversion.deepspeed_layout import (
    EMBEDDING_LAYER,
    DeepSpeedDirectory,
    layer_and_key,
    parameter_name,
)
from megatron_xmtf.conversion.deepspeed_slices import FragmentFiles, LayerFiles, Slice, SliceSource, UniversalFiles
from megatron_xmtf.conversion.deepspeed_zero import ZeroFiles
from megatron_xmtf.conversion.finite import convert_part
from megatron_xmtf.conversion.huggingface_model import dtype_name
from megatron_xmtf.conversion.mapping import MatchedParameter, expand_rows
from megatron_xmtf.conversion.replicas import ReplicaRule, Replicas
from megatron_xmtf.conversion.safetensors_file import DTYPES
from megatron_xmtf.conversion.tensor_source import TensorSource, matched_tensor
from megatron_xmtf.conversion.torch_file import check_bytes
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.bloom_architecture import BloomArchitecture

__all__ = ["DeepSpeedSource", "WeightSource", "open_slices", "stored_rows"]

WeightSource = Literal["stored", "fp32"]
"""stored: the layer files, as half-precision training computed with them. fp32: the optimizer's own weights."""
EMBEDDING = "word_embeddings.weight"


def open_slices(found: DeepSpeedDirectory, weights: WeightSource) -> tuple[SliceSource, str]:
    """Open what the weights are read from; say what it is."""
    if found.kind == "universal":
        return UniversalFiles(found.path), "universal"
    if found.kind == "fragments":
        return FragmentFiles(found.path), "fragments"
    layers = LayerFiles(found.path)
    if weights == "stored":
        return layers, "layer files"
    return ZeroFiles(found.path, tensor_parallel_size=layers.tensor_parallel_size), "zero files"


def stored_rows(source: SliceSource, directory: Path, *, hidden_size: object) -> int:
    """Return the rows of the embedding, those of padding counted.

    Raises:  CheckpointError: there is no embedding. ConfigError: `hidden_size`, as a config.json gives it, is no size.
    """
    name = parameter_name(EMBEDDING_LAYER, EMBEDDING)
    if name not in source.names:
        raise CheckpointError(f"{directory} holds no {name} (layer_01): it is not a whole BLOOM.")
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise ConfigError(f"hidden_size is {hidden_size!r} in the model's config.json; it must be a number above 0.")
    return sum(math.prod(part.shape) for part in source.slices(name)) // hidden_size


class DeepSpeedSource(TensorSource):
    """An opened checkpoint of Megatron-DeepSpeed as the tensors of ours.

    Args:    weights: which values are taken. replicas: what becomes of copies that differ. dtype: type to store; None
             keeps the files'.
    Raises:  CheckpointError: names what is missing, unexpected, misshaped or of mixed type, with its file.
    """

    def __init__(
        self,
        found: DeepSpeedDirectory,
        architecture: BloomArchitecture,
        *,
        weights: WeightSource,
        replicas: ReplicaRule,
        dtype: torch.dtype | None,
    ) -> None:
        self._slices, _ = open_slices(found, weights)
        self._replicas = Replicas(replicas)
        self._num_layers = architecture.num_layers
        self._stored_rows = stored_rows(self._slices, found.path, hidden_size=architecture.hidden_size)
        self.parameters = expand_rows(bloom_mapping(architecture))
        self._match(architecture, found.path)
        types = self._types(found.path)
        self.stored_bytes = sum(math.prod(one.shape) * types[one.ours].itemsize for one in self.parameters)
        """Bytes of the weights as the files have them, once each."""
        self.tensors = [
            matched_tensor(parameter, dtype or types[parameter.ours], read_as=types[parameter.ours])
            for parameter in self.parameters
        ]
        self._by_name = {
            tensor.name: (parameter, tensor.dtype)
            for parameter, tensor in zip(self.parameters, self.tensors, strict=True)
        }

    @property
    def files(self) -> list[Path]:
        """The files that hold its weights."""
        return sorted({path for parameter in self.parameters for path in self._slices.files_of(self._name(parameter))})

    def files_to_check(self, name: str) -> list[Path]:
        """Return the files of a parameter: all hold checksums."""
        return self._slices.files_of(self._name(self._by_name[name][0]))

    def check(self, path: Path) -> None:
        """Compare a file with its checksums, as `TensorSource.check`."""
        check_bytes(path)

    def take_notes(self) -> dict[str, float]:
        """Return how far copies were apart: parameter and file -> largest difference from rank 0's."""
        notes, self._replicas.drifts = self._replicas.drifts, {}
        return notes

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return our rows [first, last) of a parameter, put together out of the ranks' slices.

        Raises:  NonFiniteError: NaN or Inf. CheckpointError: copies differ and the rule is refuse.
        """
        parameter, dtype = self._by_name[name]
        if rows[0] >= parameter.shape[0]:
            return torch.zeros((rows[1] - rows[0], *parameter.shape[1:]), dtype=dtype)
        theirs = self._name(parameter)
        slices = self._slices.slices(theirs)
        part = self._rows(parameter, slices, *rows)
        return convert_part(part, dtype=dtype, name=f"{theirs} in {slices[0].file}")

    def _name(self, parameter: MatchedParameter) -> str:
        """Return a parameter's name in the source."""
        return parameter_name(*layer_and_key(parameter.hf[0], num_layers=self._num_layers))

    def _slice_shape(self, parameter: MatchedParameter) -> tuple[int, ...]:
        """Return the shape of each rank's slice."""
        shape, ranks = list(parameter.shape), self._slices.tensor_parallel_size
        if parameter.split == "vocabulary rows":
            shape[0] = self._stored_rows // ranks
        elif parameter.split == "column rows":
            shape[0] //= ranks
        elif parameter.split == "row columns":
            shape[1] //= ranks
        return tuple(shape)

    def _rows(self, parameter: MatchedParameter, slices: list[Slice], start: int, end: int) -> torch.Tensor:
        """Return rows [start, end) of the whole parameter."""
        shape = self._slice_shape(parameter)
        if parameter.split == "replicated":
            copies = [part.rows(start, end, shape=shape) for part in slices]
            return self._replicas.choose(copies, name=self._name(parameter), file=slices[0].file)
        if parameter.split == "row columns":
            return torch.cat([part.rows(start, end, shape=shape) for part in slices], dim=1)
        parts = []
        for rank, part in enumerate(slices):
            low, high = max(start, rank * shape[0]), min(end, (rank + 1) * shape[0])
            if low < high:
                parts.append(part.rows(low - rank * shape[0], high - rank * shape[0], shape=shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _match(self, architecture: BloomArchitecture, directory: Path) -> None:
        """Match every tensor once, by name."""
        wanted = {self._name(parameter): parameter for parameter in self.parameters}
        names = self._slices.names
        missing = [f"{name} (layer_{_layer(wanted[name], architecture):02d})" for name in wanted if name not in names]
        unexpected = [f"{name} in {file.name}" for name, file in names.items() if name not in wanted]
        if missing or unexpected:
            raise CheckpointError(
                f"{directory} does not hold the tensors of a bloom with {architecture.num_layers} layers: "
                f"missing ({len(missing)}): {', '.join(missing[:8]) or 'none'}; "
                f"unexpected ({len(unexpected)}): {', '.join(unexpected[:8]) or 'none'}. "
                "A conversion is complete or not done; get the whole checkpoint, or the config.json that belongs to it."
            )
        if self._stored_rows < architecture.vocab_size:
            raise CheckpointError(
                f"{directory}: the embedding has {self._stored_rows} rows and vocab_size is "
                f"{architecture.vocab_size}; rows can be dropped, not made up."
            )

    def _types(self, directory: Path) -> dict[str, torch.dtype]:
        """Return the type of each parameter; check that all its slices have it, and their shape."""
        types: dict[str, torch.dtype] = {}
        problems = []
        for parameter in self.parameters:
            name = self._name(parameter)
            slices = self._slices.slices(name)
            problems += _slice_problems(name, slices, self._slice_shape(parameter))
            types[parameter.ours] = slices[0].dtype
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(f"{directory}: {'; '.join(problems[:8])}{more}. Get the files again from one source.")
        return types


def _layer(parameter: MatchedParameter, architecture: BloomArchitecture) -> int:
    return layer_and_key(parameter.hf[0], num_layers=architecture.num_layers)[0]


def _slice_problems(name: str, slices: list[Slice], shape: tuple[int, ...]) -> list[str]:
    problems = []
    for part in slices:
        wanted = (math.prod(shape),) if part.is_flat else shape
        if part.shape != wanted:
            problems.append(f"{name} in {part.file.name} is {list(part.shape)} instead of {list(wanted)}")
        if part.dtype not in DTYPES.values() or part.dtype != slices[0].dtype:
            problems.append(f"{name} in {part.file.name} has type {dtype_name(part.dtype)}")
    return problems
