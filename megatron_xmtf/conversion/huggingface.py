"""Hugging Face model -> checkpoint -> Hugging Face model, streamed a few rows at a time, bit by bit.

    import_huggingface    files checked, every tensor matched, padded, written as torch_dist chunks    step 0
    export_huggingface    every weight matched, padding cut off, written as `save_pretrained` names it

Nothing exists under the output's name before all of it is on the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import CheckpointManifest, checkpoint_directory, open_manifest
from megatron_xmtf.checkpoint.safe_read import CheckpointReader
from megatron_xmtf.checkpoint.streamed_write import StreamedWriter, row_ranges
from megatron_xmtf.conversion.huggingface_model import (
    HuggingFaceModel,
    config_dtype,
    copy_side_files,
    dtype_name,
    read_config,
)
from megatron_xmtf.conversion.mapping import FAMILIES, FamilyMapping, MatchedParameter, check_shapes, match_names
from megatron_xmtf.conversion.model_card import model_card
from megatron_xmtf.conversion.safetensors_file import SafetensorsWriter, TensorHeader, plan_shards
from megatron_xmtf.errors import CheckpointError, CorruptCheckpointError, NonFiniteError
from megatron_xmtf.files import atomic_directory, write_json
from megatron_xmtf.models.architecture import architecture_from_hf, architecture_from_mapping
from megatron_xmtf.progress import Progress

__all__ = [
    "ExportedModel",
    "ImportedModel",
    "convert_part",
    "export_huggingface",
    "import_huggingface",
    "match_checkpoint",
    "match_model",
]

TRAINING_PREFIXES = ("optimizer.", "rng.")
"""Tensors of a training checkpoint that are no weights."""


@dataclass(frozen=True)
class ImportedModel:
    """What an import did."""

    checkpoint: Path
    tensors: int
    parameters: int
    """Numbers in the Hugging Face model; padding is not counted."""
    bytes: int
    """Bytes read."""
    dtype: str


def import_huggingface(directory: Path | str, output: Path | str, *, dtype: torch.dtype | None = None) -> ImportedModel:
    """Turn a Hugging Face model into a checkpoint of step 0.

    Memory: one chunk of `streamed_write.CHUNK_BYTES`, whatever the size of the model.

    Args:    dtype: type to store; None keeps each tensor's own.
    Raises:  CheckpointError: unknown architecture; tensors missing, unexpected, of another shape.
             NonFiniteError: NaN or Inf in a weight, also one made by the change of type.
             ConfigError: `output` exists. On any error nothing is left at `output`.
    """
    output = Path(output)
    with HuggingFaceModel(directory) as model:
        architecture = architecture_from_hf(model.config)
        parameters = match_model(model)
        stored = {dtype_name(dtype or model.tensors[parameter.hf].dtype) for parameter in parameters}
        stored_name = stored.pop() if len(stored) == 1 else "mixed"
        total = sum(_bytes(model, parameter) for parameter in parameters)
        with checkpoint_directory(
            output,
            step=0,
            architecture=architecture.to_mapping(),
            dtype=stored_name,
            config=None,
            consumed_rows=0,
            contents=["model"],
        ) as temporary:
            with (
                Progress("import", total=round(total / 1e6), unit="MB") as progress,
                StreamedWriter(temporary) as writer,
            ):
                for parameter in parameters:
                    _import_tensor(model, parameter, writer, progress, dtype=dtype)
                writer.finish()
            copy_side_files(model.directory, temporary / "hf")
    count = sum(torch.Size(parameter.shape).numel() for parameter in parameters)
    return ImportedModel(output, len(parameters), count, total, stored_name)


def match_model(model: HuggingFaceModel) -> list[MatchedParameter]:
    """Match every tensor of a Hugging Face model to ours, by name and shape.

    Raises:  CheckpointError: missing, unexpected or misshaped tensors, or a head that is not the embedding.
    """
    architecture = architecture_from_hf(model.config)
    mapping = FAMILIES[architecture.family]
    what = str(model.directory)
    parameters = match_names(mapping, architecture, names=model.tensors, what=what, side="hf")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    check_shapes(parameters, shapes, what=what, side="hf")
    _check_tied_head(model, mapping, parameters)
    return parameters


def convert_part(part: torch.Tensor, *, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """Change the type of some rows of a weight.

    Raises:  NonFiniteError: NaN or Inf, before or after.
    """
    _check_finite(part, f"{name} holds NaN or Inf; a model with such weights cannot be used.")
    if dtype is None or dtype == part.dtype:
        return part
    converted = part.to(dtype)
    _check_finite(converted, f"{name}: its largest weight {part.abs().max():.3g} does not fit {dtype_name(dtype)}.")
    return converted


def _check_finite(part: torch.Tensor, message: str) -> None:
    # The extremes carry NaN and Inf along; `isfinite` of a whole tensor would make a copy of it.
    if part.numel() and not torch.isfinite(torch.stack(torch.aminmax(part))).all():
        raise NonFiniteError(message)


def _import_tensor(
    model: HuggingFaceModel,
    parameter: MatchedParameter,
    writer: StreamedWriter,
    progress: Progress,
    *,
    dtype: torch.dtype | None,
) -> None:
    rows, padded_rows = parameter.shape[0], parameter.padded_shape[0]
    row_bytes = _bytes(model, parameter) // rows
    rest = (0,) * (len(parameter.shape) - 1)
    written_dtype = dtype or model.tensors[parameter.hf].dtype
    for start, end in row_ranges(rows, row_bytes):
        part = convert_part(model.read(parameter.hf, rows=(start, end)), dtype=dtype, name=parameter.hf)
        writer.write(parameter.ours, part, offsets=(start, *rest), shape=parameter.padded_shape)
        progress.advance(round(end * row_bytes / 1e6) - round(start * row_bytes / 1e6))
    for start, end in row_ranges(padded_rows - rows, row_bytes):
        zeros = torch.zeros((end - start, *parameter.shape[1:]), dtype=written_dtype)
        writer.write(parameter.ours, zeros, offsets=(rows + start, *rest), shape=parameter.padded_shape)


def _bytes(model: HuggingFaceModel, parameter: MatchedParameter) -> int:
    return torch.Size(parameter.shape).numel() * model.tensors[parameter.hf].dtype.itemsize


def _check_tied_head(model: HuggingFaceModel, mapping: FamilyMapping, parameters: list[MatchedParameter]) -> None:
    """Accept a stored output layer only where it is the embedding, bit by bit."""
    head = model.tensors.get(mapping.tied_head)
    if head is None:
        return
    embedding = next(parameter for parameter in parameters if parameter.ours == mapping.embedding)
    same = head.shape == embedding.shape and head.dtype == model.tensors[embedding.hf].dtype
    row_bytes = _bytes(model, embedding) // embedding.shape[0]
    for rows in row_ranges(embedding.shape[0], row_bytes):
        same = same and torch.equal(model.read(mapping.tied_head, rows=rows), model.read(embedding.hf, rows=rows))
    if not same:
        raise CheckpointError(
            f"{model.directory}: {mapping.tied_head} differs from {embedding.hf}; the output layer is always the "
            "embedding here, so it cannot be kept. Remove it if it is not meant to be used."
        )


@dataclass(frozen=True)
class ExportedModel:
    """What an export did."""

    directory: Path
    checkpoint: Path
    step: int
    tensors: int
    parameters: int
    bytes: int
    """Bytes of weights written."""
    dtype: str
    files: tuple[str, ...]


def export_huggingface(
    checkpoint: Path | str, output: Path | str, *, dtype: torch.dtype | None = None
) -> ExportedModel:
    """Write the weights of a checkpoint as `save_pretrained` would, with config, tokenizer files and a model card.

    Memory: the rows of one stored chunk twice; an imported model's chunks have at most 256 MiB.

    Args:    checkpoint: one, or a run directory (its newest). dtype: type to write; None keeps each tensor's own.
    Raises:  MissingError, CorruptCheckpointError: not there, not whole. CheckpointError: tensors missing or unexpected.
             NonFiniteError: NaN or Inf in a weight. ConfigError: `output` exists. On any error nothing is left there.
    """
    output, checkpoint = Path(output), find_checkpoint(checkpoint)
    manifest = open_manifest(checkpoint)
    mapping = FAMILIES[architecture_from_mapping(manifest.architecture).family]
    with CheckpointReader(checkpoint) as reader, atomic_directory(output) as temporary:
        parameters = match_checkpoint(reader, manifest)
        copy_side_files(checkpoint / "hf", temporary)
        headers = [
            TensorHeader(parameter.hf, parameter.shape, dtype or reader.tensors[parameter.ours].dtype)
            for parameter in parameters
        ]
        by_name = {header.name: parameter for header, parameter in zip(headers, parameters, strict=True)}
        stored = {dtype_name(header.dtype) for header in headers}
        name = stored.pop() if len(stored) == 1 else "mixed"
        _write_config(temporary, name, architecture_class=mapping.architecture_class)
        shards = plan_shards(headers)
        count = sum(torch.Size(header.shape).numel() for header in headers)
        total = sum(header.bytes for header in headers)
        with Progress("export", total=round(total / 1e6), unit="MB") as progress:
            for file_name, shard in shards.items():
                with SafetensorsWriter(temporary / file_name, shard) as writer:
                    for header in writer.headers:
                        _export_tensor(reader, by_name[header.name], header, writer, progress)
        _write_index(temporary, shards, parameters=count)
        (temporary / "README.md").write_text(model_card(manifest, dtype=name, parameters=count), encoding="utf-8")
    files = tuple(sorted(path.name for path in output.iterdir()))
    return ExportedModel(output, checkpoint, manifest.step, len(headers), count, total, name, files)


def match_checkpoint(reader: CheckpointReader, manifest: CheckpointManifest) -> list[MatchedParameter]:
    """Match every weight of a checkpoint to the name that `save_pretrained` gives it, by name and shape.

    Raises:  CheckpointError: missing, unexpected or misshaped tensors.
    """
    architecture = architecture_from_mapping(manifest.architecture)
    names = [name for name in reader.tensors if not name.startswith(TRAINING_PREFIXES)]
    what = str(reader.directory)
    parameters = match_names(FAMILIES[architecture.family], architecture, names=names, what=what, side="ours")
    shapes = {name: reader.tensors[name].shape for name in names}
    check_shapes(parameters, shapes, what=what, side="ours")
    return parameters


def _export_tensor(
    reader: CheckpointReader,
    parameter: MatchedParameter,
    header: TensorHeader,
    writer: SafetensorsWriter,
    progress: Progress,
) -> None:
    """Write one tensor without the padded rows of the vocabulary."""
    row_bytes = header.bytes // header.shape[0]
    for start, end in reader.row_parts(parameter.ours, rows=header.shape[0]):
        part = reader.read(parameter.ours, rows=(start, end))
        writer.write(header.name, convert_part(part, dtype=header.dtype, name=parameter.ours))
        progress.advance(round(end * row_bytes / 1e6) - round(start * row_bytes / 1e6))


def _write_index(directory: Path, shards: dict[str, list[TensorHeader]], *, parameters: int) -> None:
    if len(shards) == 1:
        return
    total = sum(header.bytes for shard in shards.values() for header in shard)
    weight_map = {header.name: name for name, shard in shards.items() for header in shard}
    contents = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(directory / "model.safetensors.index.json", contents)


def _write_config(directory: Path, dtype: str, *, architecture_class: str) -> None:
    """Bring the carried config.json up to the written weights; untouched, byte for byte, where it says so already."""
    try:
        config = read_config(directory)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            "the checkpoint carries no hf/config.json, so it cannot be exported; import the model again."
        ) from error
    changed: dict[str, Any] = {}
    if dtype != "mixed" and config_dtype(config) != dtype:
        # `dtype` is the name since transformers 4.56; older ones read `torch_dtype` alone.
        changed = {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    if architecture_class not in (config.get("architectures") or []):
        changed["architectures"] = [architecture_class]
    if changed:
        text = json.dumps({**config, **changed}, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
