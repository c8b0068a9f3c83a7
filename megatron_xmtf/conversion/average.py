"""Average the weights of several checkpoints of one model, a few rows at a time.

    average = sum of weight x value, each term and the sum in fp64, then the type that is stored

fp64 costs nothing here, reading does. Optimizer and RNG state are left out: an average has no moments. The result is a
checkpoint of step 0 whose manifest names its parts (`origin`).
Source:  branch `ckptavg` of bigscience-workshop/Megatron-DeepSpeed averages N checkpoints in fp64, equally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest, open_manifest
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.checkpoint.row_ranges import CHUNK_BYTES, row_ranges
from megatron_xmtf.conversion.checkpoint_parts import CheckpointDescription, write_checkpoint
from megatron_xmtf.conversion.finite import convert_part
from megatron_xmtf.conversion.huggingface_export import TRAINING_PREFIXES
from megatron_xmtf.conversion.huggingface_model import copy_side_files, dtype_name
from megatron_xmtf.conversion.tensor_source import SourceTensor, TensorSource
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.files import read_json, sha256_file, write_json

__all__ = ["AveragedCheckpoint", "average_checkpoints"]


@dataclass(frozen=True)
class AveragedCheckpoint:
    """What was averaged."""

    checkpoint: Path
    sources: tuple[Path, ...]
    weights: tuple[float, ...]
    tensors: int
    parameters: int
    """Numbers of a checkpoint, padding counted."""
    dtype: str


def average_checkpoints(
    checkpoints: Sequence[Path | str],
    output: Path | str,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    restart: bool = False,
) -> AveragedCheckpoint:
    """Write the weighted average of checkpoints as a checkpoint of step 0.

    Memory: a few times `row_ranges.CHUNK_BYTES` in each process: what is read, as a term and as the sum in fp64.

    Args:    checkpoints: two or more, each one or a run directory (its newest). weights: one each; they may be
             negative (task arithmetic), must be finite and sum to 1 within 1e-6; None: equal. dtype: type to store;
             None: as in the sources, which then must agree. workers, restart: as in `write_checkpoint`.
    Raises:  ConfigError: too few checkpoints, weights that do not fit, `output` exists. CheckpointError: other
             architectures, tensors, shapes or types; they are named. NonFiniteError: NaN or Inf. On any error nothing
             is left at `output`.
    """
    shares = _checked_weights(len(checkpoints), weights)
    found = [find_checkpoint(path) for path in checkpoints]
    manifests = [open_manifest(path) for path in found]
    _check_architectures(found, manifests)
    reads_both_ways = _common_direction(found, manifests)
    open_source = partial(AverageSource, tuple(found), tuple(shares), dtype)

    def add_files(directory: Path) -> None:
        copy_side_files(found[0] / "hf", directory / "hf")
        if reads_both_ways:
            # A run says so in its configuration, which an average has not.
            config = directory / "hf" / "config.json"
            write_json(config, {**read_json(config), "prefix_lm": True})

    with open_source() as source:
        count, parameters = len(source.tensors), sum(math.prod(tensor.shape) for tensor in source.tensors)
        written = write_checkpoint(
            output,
            source,
            open_source,
            describe=CheckpointDescription(
                manifests[0].architecture, origin={"average_of": _origin(found, manifests, shares)}
            ),
            add_files=add_files,
            settings={"shares": shares, "dtype": str(dtype)},
            workers=workers,
            restart=restart,
            what="average",
        )
    return AveragedCheckpoint(Path(output), tuple(found), tuple(shares), count, parameters, written.dtype)


class AverageSource(TensorSource):
    """The average of opened checkpoints as the tensors of another.

    Args:    shares: weight of each. dtype: type to store; None: that of the checkpoints.
    Raises:  CheckpointError: other tensors, shapes or types.
    """

    def __init__(self, checkpoints: Sequence[Path], shares: Sequence[float], dtype: torch.dtype | None) -> None:
        self._shares = shares
        with ExitStack() as stack:
            self._readers = [stack.enter_context(CheckpointReader(path, once=True)) for path in checkpoints]
            shapes = {name: self._readers[0].tensors[name].shape for name in _common_tensors(self._readers)}
            self.tensors = [
                _averaged_tensor(name, shape, dtype or _common_dtype(self._readers, name))
                for name, shape in shapes.items()
            ]
            self._stack = stack.pop_all()
        self._tensors = {tensor.name: tensor for tensor in self.tensors}

    @property
    def files(self) -> list[Path]:
        """Their manifests, which hold the hashes of all their files."""
        return [reader.directory / MANIFEST_NAME for reader in self._readers]

    def close(self) -> None:
        """Close the checkpoints."""
        self._stack.close()

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Return the average of some rows.

        Raises:  NonFiniteError: NaN or Inf in one, or in the average. CorruptCheckpointError: a chunk cannot be read.
        """
        tensor = self._tensors[name]
        total: torch.Tensor | None = None
        for reader, share in zip(self._readers, self._shares, strict=True):
            part = reader.read(name, rows=rows if tensor.shape else None)
            term = convert_part(part, dtype=None, name=f"{name} in {reader.directory}").double() * share
            total = term if total is None else total.add_(term)
        assert total is not None, "there are two checkpoints at least"
        return convert_part(total, dtype=tensor.dtype, name=name)


def _averaged_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> SourceTensor:
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    chunks = row_ranges(shape[0] if shape else 1, row_bytes, chunk_bytes=CHUNK_BYTES)
    return SourceTensor(name, shape, dtype, tuple(chunks))


def _checked_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    if count < 2:
        raise ConfigError(f"{count} checkpoint to average; give at least two (--checkpoint A --checkpoint B).")
    if not weights:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ConfigError(f"{count} checkpoints and {len(weights)} weights; give one --weight for each, or none.")
    if not all(math.isfinite(weight) for weight in weights) or abs(math.fsum(weights) - 1.0) > 1e-6:
        raise ConfigError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} sum to {math.fsum(weights):g}; "
            "a model's scale is kept only if they sum to 1."
        )
    return list(weights)


def _check_architectures(found: Sequence[Path], manifests: Sequence[CheckpointManifest]) -> None:
    first = manifests[0].architecture
    for path, manifest in zip(found[1:], manifests[1:], strict=True):
        keys = sorted(
            key
            for key in first.keys() | manifest.architecture.keys()
            # What a run drops out is its setting; the weights are of one model all the same.
            if not key.endswith("dropout") and first.get(key) != manifest.architecture.get(key)
        )
        if keys:
            listed = ", ".join(f"{key} is {manifest.architecture.get(key)}, not {first.get(key)}" for key in keys)
            raise CheckpointError(f"{path} and {found[0]} are not of one architecture: {listed}.")


def _common_direction(found: Sequence[Path], manifests: Sequence[CheckpointManifest]) -> bool:
    """Return whether all of them read inputs in both directions (prefix-LM)."""
    directions = [attends_prefix(path, manifest) for path, manifest in zip(found, manifests, strict=True)]
    if len(set(directions)) > 1:
        raise CheckpointError(
            "some of the checkpoints were trained to read inputs in both directions (batch.prefix_lm), some not: "
            + ", ".join(f"{path}: {direction}" for path, direction in zip(found, directions, strict=True))
            + ". Their average would be neither."
        )
    return directions[0]


def _common_tensors(readers: Sequence[CheckpointReader]) -> list[str]:
    """Return the names of the weights; all checkpoints must have the same, in the same shapes, as floating point."""
    listed = [
        {name: tensor for name, tensor in reader.tensors.items() if not name.startswith(TRAINING_PREFIXES)}
        for reader in readers
    ]
    for reader, tensors in zip(readers, listed, strict=True):
        differing = sorted(
            name
            for name in tensors.keys() | listed[0].keys()
            if name not in tensors or name not in listed[0] or tensors[name].shape != listed[0][name].shape
        )
        if differing:
            raise CheckpointError(
                f"{reader.directory} and {readers[0].directory} do not hold the same tensors: "
                f"{', '.join(differing[:8])} ({len(differing)} in all) are in one alone or of another shape."
            )
        integers = [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]
        if integers:
            raise CheckpointError(
                f"{reader.directory}: {', '.join(integers[:8])} hold whole numbers, which have no average."
            )
    return list(listed[0])


def _common_dtype(readers: Sequence[CheckpointReader], name: str) -> torch.dtype:
    types = {reader.directory: reader.tensors[name].dtype for reader in readers}
    if len(set(types.values())) > 1:
        raise CheckpointError(
            f"{name} is "
            + ", ".join(f"{dtype_name(kept)} in {path}" for path, kept in types.items())
            + ". Give the type to store (--dtype)."
        )
    return readers[0].tensors[name].dtype


def _origin(
    found: Sequence[Path], manifests: Sequence[CheckpointManifest], shares: Sequence[float]
) -> list[dict[str, object]]:
    """Name each source by its directory, step and manifest, without the path to it, which is nobody else's."""
    return [
        {
            "name": path.name,
            "step": manifest.step,
            "manifest_sha256": sha256_file(path / MANIFEST_NAME),
            "weight": share,
        }
        for path, manifest, share in zip(found, manifests, shares, strict=True)
    ]
