"""Checkpoint -> Hugging Face model: every weight matched, padding cut off, written a few rows at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import CheckpointManifest, open_manifest
from megatron_xmtf.checkpoint.safe_read import CheckpointReader
from megatron_xmtf.checkpoint.streamed_write import row_ranges
from megatron_xmtf.conversion.huggingface_model import config_dtype, copy_side_files, dtype_name, read_config
from megatron_xmtf.conversion.import_model import convert_part
from megatron_xmtf.conversion.mapping import FAMILIES, MatchedParameter, check_shapes, match_names
from megatron_xmtf.conversion.model_card import model_card
from megatron_xmtf.conversion.safetensors_file import SafetensorsWriter, TensorHeader, plan_shards
from megatron_xmtf.errors import CorruptCheckpointError
from megatron_xmtf.files import atomic_directory, write_json
from megatron_xmtf.models.architecture import architecture_from_mapping
from megatron_xmtf.progress import Progress

__all__ = ["ExportedModel", "export_hugging_face", "match_checkpoint"]

TRAINING_PREFIXES = ("optimizer.", "rng.")
"""Tensors of a training checkpoint that are no weights."""


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


def export_hugging_face(
    checkpoint: Path | str, output: Path | str, *, dtype: torch.dtype | None = None
) -> ExportedModel:
    """Write the weights of a checkpoint as `save_pretrained` would, with config, tokenizer files and a model card.

    Memory: one chunk as it is stored, whatever the size of the model.

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
            TensorHeader(mapping.prefix + parameter.hf, parameter.shape, dtype or reader.tensors[parameter.ours].dtype)
            for parameter in parameters
        ]
        by_name = {header.name: parameter for header, parameter in zip(headers, parameters, strict=True)}
        shards = plan_shards(headers)
        total = sum(header.bytes for header in headers)
        with Progress("export", total=round(total / 1e6), unit="MB") as progress:
            for file_name, shard in shards.items():
                with SafetensorsWriter(temporary / file_name, shard) as writer:
                    for header in writer.headers:
                        _export_tensor(reader, by_name[header.name], header, writer, progress)
        count = sum(torch.Size(header.shape).numel() for header in headers)
        _write_index(temporary, shards, parameters=count)
        stored = {dtype_name(header.dtype) for header in headers}
        name = stored.pop() if len(stored) == 1 else "mixed"
        _write_config(temporary, name, architecture_class=mapping.architecture_class)
        (temporary / "README.md").write_text(model_card(manifest, dtype=name, parameters=count), encoding="utf-8")
    files = tuple(sorted(path.name for path in output.iterdir()))
    return ExportedModel(output, checkpoint, manifest.step, len(headers), count, total, name, files)


def match_checkpoint(reader: CheckpointReader, manifest: CheckpointManifest) -> list[MatchedParameter]:
    """Match every weight of a checkpoint to its Hugging Face name (without the prefix), by name and shape.

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
    row_bytes = max(1, header.bytes // header.shape[0])
    for start, end in row_ranges(header.shape[0], row_bytes):
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
