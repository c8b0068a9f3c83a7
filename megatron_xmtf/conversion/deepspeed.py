"""BigScience's Megatron-DeepSpeed checkpoint of a BLOOM -> checkpoint of step 0, streamed a few rows at a time.

    tensor-parallel slices (`deepspeed_slices`)    rule by the parameter's split (`mapping`)
    QKV, h_to_4h with biases, embedding            one below the other
    dense.weight, 4h_to_h.weight                   side by side
    LayerNorms, dense.bias, 4h_to_h.bias           copies: `replicas`

Rows of QKV are [heads, 3, head_dim] on all sides. Nothing exists under the output's name before all is on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_xmtf.checkpoint.manifest import checkpoint_directory
from megatron_xmtf.checkpoint.streamed_write import CHUNK_BYTES, StreamedWriter, row_ranges
from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
from megatron_xmtf.conversion.deepspeed_layout import (
    EMBEDDING_LAYER,
    DeepSpeedDirectory,
    find_deepspeed,
    layer_and_key,
    parameter_name,
    read_settings,
    settings_to_hf,
)
from megatron_xmtf.conversion.deepspeed_slices import FragmentFiles, LayerFiles, Slice, SliceSource, UniversalFiles
from megatron_xmtf.conversion.deepspeed_zero import ZeroFiles
from megatron_xmtf.conversion.huggingface import convert_part
from megatron_xmtf.conversion.huggingface_model import DTYPES, copy_side_files, dtype_name, read_config
from megatron_xmtf.conversion.mapping import MatchedParameter, expand_rows
from megatron_xmtf.conversion.replicas import ReplicaRule, Replicas
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.files import require_directory, write_json
from megatron_xmtf.models.bloom_architecture import BloomArchitecture, bloom_from_hf
from megatron_xmtf.progress import Progress

__all__ = ["ImportedDeepSpeed", "WeightSource", "given_config", "import_deepspeed", "write_side_files"]

WeightSource = Literal["stored", "fp32"]
"""stored: the layer files, as half-precision training computed with them. fp32: the optimizer's own weights."""
EMBEDDING = "word_embeddings.weight"


@dataclass(frozen=True)
class ImportedDeepSpeed:
    """What an import did."""

    checkpoint: Path
    source: Path
    """The step's directory."""
    read: str
    """Which of its files: layer files, zero files, universal, fragments."""
    tensors: int
    parameters: int
    """Numbers in the model; padding is not counted."""
    bytes: int
    """Bytes of weights, once each."""
    dtype: str
    tensor_parallel_size: int
    iteration: int | None
    """Of the run that wrote it, where it says so."""
    dropped_vocabulary_rows: int
    differing_replicas: int
    """Parameters whose copies on tensor-parallel ranks differed."""
    max_replica_drift: float
    worst_replica: str | None
    left_out: tuple[str, ...] = field(default=())
    """What the directory holds besides and was not read."""


@dataclass(frozen=True)
class _Reading:
    """A source matched to a model."""

    source: SliceSource
    replicas: Replicas
    num_layers: int
    stored_vocabulary: int

    def name_of(self, parameter: MatchedParameter) -> str:
        """Return a parameter's name in the source."""
        return parameter_name(*layer_and_key(parameter.hf[0], num_layers=self.num_layers))

    def slice_shape(self, parameter: MatchedParameter) -> tuple[int, ...]:
        """Return the shape of each rank's slice."""
        shape, ranks = list(parameter.shape), self.source.tensor_parallel_size
        if parameter.split == "vocabulary rows":
            shape[0] = self.stored_vocabulary // ranks
        elif parameter.split == "column rows":
            shape[0] //= ranks
        elif parameter.split == "row columns":
            shape[1] //= ranks
        return tuple(shape)

    def rows(self, parameter: MatchedParameter, slices: list[Slice], start: int, end: int) -> torch.Tensor:
        """Return rows [start, end) of the whole parameter."""
        shape = self.slice_shape(parameter)
        if parameter.split == "replicated":
            copies = [part.rows(start, end, shape=shape) for part in slices]
            return self.replicas.choose(copies, name=self.name_of(parameter), file=slices[0].file)
        if parameter.split == "row columns":
            return torch.cat([part.rows(start, end, shape=shape) for part in slices], dim=1)
        parts = []
        for rank, part in enumerate(slices):
            low, high = max(start, rank * shape[0]), min(end, (rank + 1) * shape[0])
            if low < high:
                parts.append(part.rows(low - rank * shape[0], high - rank * shape[0], shape=shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def import_deepspeed(
    directory: Path | str,
    output: Path | str,
    *,
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    vocab_size: int | None = None,
    weights: WeightSource = "stored",
    replicas: ReplicaRule = "average",
    dtype: torch.dtype | None = None,
) -> ImportedDeepSpeed:
    """Turn a checkpoint of Megatron-DeepSpeed's pipeline into a checkpoint of step 0.

    Memory: one chunk of `streamed_write.CHUNK_BYTES`, twice where slices are put together.

    Args:    directory: of a step, or the one above with `latest`. config: a BLOOM's config.json or a directory with
             it; None: by the run's own settings. tokenizer: directory whose tokenizer files go along.
             vocab_size: rows of the embedding to keep; None: as `config` says, or all, as the published models do.
             weights: which values are taken. replicas: what becomes of copies that differ. dtype: type to store;
             None keeps the files'.
    Raises:  MissingError, CheckpointError, CorruptCheckpointError: not there, not a BLOOM, not whole; file and tensor
             are named. NonFiniteError: NaN or Inf. ConfigError: `output` exists. On any error nothing is left there.
    """
    output, found = Path(output), find_deepspeed(directory)
    source, read = _open_source(found, weights)
    if config is None:
        settings = read_settings(found.path)
        values, iteration = settings_to_hf(settings, what=found.path), settings.iteration
    else:
        values, iteration = given_config(Path(config)), None
    stored_rows = _stored_rows(source, found.path, hidden_size=values.get("hidden_size", values.get("n_embed")))
    values["vocab_size"] = vocab_size or values.get("vocab_size", stored_rows)
    architecture = bloom_from_hf(values)
    reading = _Reading(source, Replicas(replicas), architecture.num_layers, stored_rows)
    parameters, types = _match(reading, architecture, found.path)
    stored = {dtype_name(dtype or kept) for kept in types.values()}
    stored_name = stored.pop() if len(stored) == 1 else "mixed"
    total = sum(math.prod(parameter.shape) * types[parameter.ours].itemsize for parameter in parameters)
    with checkpoint_directory(
        output,
        step=0,
        architecture=architecture.to_mapping(),
        dtype=stored_name,
        config=None,
        consumed_rows=0,
        contents=["model"],
        origin={
            "format": "megatron-deepspeed",
            "name": found.path.name,
            "iteration": iteration,
            "weights": read,
            "replicas": replicas,
        },
    ) as temporary:
        with Progress("import", total=round(total / 1e6), unit="MB") as progress, StreamedWriter(temporary) as writer:
            for parameter in parameters:
                _import_parameter(reading, parameter, writer, progress, dtype=dtype or types[parameter.ours])
            writer.finish()
        write_side_files(temporary / "hf", values, stored_name, config=config, tokenizer=tokenizer)
    return ImportedDeepSpeed(
        checkpoint=output,
        source=found.path,
        read=read,
        tensors=len(parameters),
        parameters=sum(math.prod(parameter.shape) for parameter in parameters),
        bytes=total,
        dtype=stored_name,
        tensor_parallel_size=source.tensor_parallel_size,
        iteration=iteration,
        dropped_vocabulary_rows=stored_rows - architecture.vocab_size,
        differing_replicas=reading.replicas.differing,
        max_replica_drift=reading.replicas.max_drift,
        worst_replica=reading.replicas.worst,
        left_out=_left_out(found, weights),
    )


def _open_source(found: DeepSpeedDirectory, weights: WeightSource) -> tuple[SliceSource, str]:
    """Open what the weights are read from; say what it is."""
    if found.kind == "universal":
        return UniversalFiles(found.path), "universal"
    if found.kind == "fragments":
        return FragmentFiles(found.path), "fragments"
    layers = LayerFiles(found.path)
    if weights == "stored":
        return layers, "layer files"
    return ZeroFiles(found.path, tensor_parallel_size=layers.tensor_parallel_size), "zero files"


def _left_out(found: DeepSpeedDirectory, weights: WeightSource) -> tuple[str, ...]:
    """Say what else is there."""
    if found.kind != "layers":
        return ("moments of the optimizer",)
    if not any("_optim_states.pt" in path.name for path in found.path.iterdir()):
        return ()
    return ("moments of the optimizer",) if weights == "fp32" else ("fp32 weights and moments of the optimizer",)


def given_config(config: Path) -> dict[str, Any]:
    """Read a BLOOM's config.json, or that of a directory.

    Raises:  MissingError: not there. CheckpointError: of another family.
    """
    values = read_config(config.parent if config.name == "config.json" else require_directory(config))
    if values.get("model_type") != "bloom":
        raise CheckpointError(f"{config}: model_type {values.get('model_type')!r}; only a bloom is stored so.")
    return dict(values)


def _stored_rows(source: SliceSource, directory: Path, *, hidden_size: object) -> int:
    """Return the rows of the embedding, those of padding counted."""
    name = parameter_name(EMBEDDING_LAYER, EMBEDDING)
    if name not in source.names:
        raise CheckpointError(f"{directory} holds no {name} (layer_01): it is not a whole BLOOM.")
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise ConfigError(f"hidden_size is {hidden_size!r} in the model's config.json; it must be a number above 0.")
    return sum(math.prod(part.shape) for part in source.slices(name, check=False)) // hidden_size


def _match(
    reading: _Reading, architecture: BloomArchitecture, directory: Path
) -> tuple[list[MatchedParameter], dict[str, torch.dtype]]:
    """Match every tensor once, by name and shape; return our parameters and the type of each.

    Raises:  CheckpointError: names what is missing, unexpected, misshaped or of mixed type, with its file.
    """
    parameters = expand_rows(bloom_mapping(architecture))
    wanted = {reading.name_of(parameter): parameter for parameter in parameters}
    names = reading.source.names
    missing = [f"{name} (layer_{_layer(wanted[name], architecture):02d})" for name in wanted if name not in names]
    unexpected = [f"{name} in {file.name}" for name, file in names.items() if name not in wanted]
    if missing or unexpected:
        raise CheckpointError(
            f"{directory} does not hold the tensors of a bloom with {architecture.num_layers} layers: "
            f"missing ({len(missing)}): {', '.join(missing[:8]) or 'none'}; "
            f"unexpected ({len(unexpected)}): {', '.join(unexpected[:8]) or 'none'}. "
            "A conversion is complete or not done; get the whole checkpoint, or the config.json that belongs to it."
        )
    if reading.stored_vocabulary < architecture.vocab_size:
        raise CheckpointError(
            f"{directory}: the embedding has {reading.stored_vocabulary} rows and vocab_size is "
            f"{architecture.vocab_size}; rows can be dropped, not made up."
        )
    types: dict[str, torch.dtype] = {}
    problems = []
    for name, parameter in wanted.items():
        slices = reading.source.slices(name, check=False)
        problems += _slice_problems(name, slices, reading.slice_shape(parameter))
        types[parameter.ours] = slices[0].dtype
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{directory}: {'; '.join(problems[:8])}{more}. Get the files again from one source.")
    return parameters, types


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


def _import_parameter(
    reading: _Reading, parameter: MatchedParameter, writer: StreamedWriter, progress: Progress, *, dtype: torch.dtype
) -> None:
    name, rest = reading.name_of(parameter), (0,) * (len(parameter.shape) - 1)
    rows, padded = parameter.shape[0], parameter.padded_shape[0]
    slices = reading.source.slices(name)
    row_bytes = math.prod(parameter.shape[1:]) * slices[0].dtype.itemsize
    for start, end in row_ranges(rows, row_bytes, chunk_bytes=CHUNK_BYTES):
        part = convert_part(
            reading.rows(parameter, slices, start, end), dtype=dtype, name=f"{name} in {slices[0].file}"
        )
        writer.write(parameter.ours, part, offsets=(start, *rest), shape=parameter.padded_shape)
        progress.advance(round(end * row_bytes / 1e6) - round(start * row_bytes / 1e6))
    for start, end in row_ranges(padded - rows, row_bytes, chunk_bytes=CHUNK_BYTES):
        zeros = torch.zeros((end - start, *parameter.shape[1:]), dtype=dtype)
        writer.write(parameter.ours, zeros, offsets=(rows + start, *rest), shape=parameter.padded_shape)


def write_side_files(
    target: Path, values: Mapping[str, Any], dtype: str, *, config: Path | str | None, tokenizer: Path | str | None
) -> None:
    """Write what an export needs besides the weights.

    Args:  values: of config.json. config: where it comes from, if it was given; a directory's other files go along.
    """
    target.mkdir()
    if config is not None and Path(config).is_dir():
        copy_side_files(Path(config), target)
    if tokenizer is not None:
        copy_side_files(require_directory(tokenizer), target)
        if config is None or not Path(config).is_dir():
            # What stands beside a tokenizer may be another model's.
            (target / "generation_config.json").unlink(missing_ok=True)
    write_json(target / "config.json", {**values, "dtype": dtype} if dtype != "mixed" else dict(values))
