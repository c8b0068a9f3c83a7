"""Checkpoint -> Hugging Face model, streamed a few rows at a time, bit by bit.

    every weight matched, padding cut off, taken apart (`mapping`), written as `save_pretrained` names it

Nothing exists under the output's name before all of it is on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import CheckpointManifest, open_manifest
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.checkpoint.safe_read import CheckpointReader
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.huggingface import convert_part
from megatron_xmtf.conversion.huggingface_model import config_dtype, copy_side_files, dtype_name, read_config
from megatron_xmtf.conversion.mapping import MatchedParameter, check_shapes, match_names
from megatron_xmtf.conversion.model_card import model_card
from megatron_xmtf.conversion.safetensors_file import SafetensorsWriter, TensorHeader, plan_shards
from megatron_xmtf.errors import ConfigError, CorruptCheckpointError
from megatron_xmtf.files import atomic_directory, write_json
from megatron_xmtf.models.architecture import architecture_from_mapping
from megatron_xmtf.progress import Progress

__all__ = ["ExportedModel", "export_huggingface", "match_checkpoint"]

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


def export_huggingface(
    checkpoint: Path | str, output: Path | str, *, dtype: torch.dtype | None = None, allow_causal: bool = False
) -> ExportedModel:
    """Write the weights of a checkpoint as `save_pretrained` would, with config, tokenizer files and a model card.

    Memory: the rows of one stored chunk twice; an imported model's chunks have at most 256 MiB.

    Args:    checkpoint: one, or a run directory (its newest). dtype: type to write; None keeps each tensor's own.
             allow_causal: write the weights of a prefix-LM, which `transformers` will run causally; config.json gets
             "prefix_lm": true, and the model card says so.
    Raises:  MissingError, CorruptCheckpointError: not there, not whole. CheckpointError: tensors missing or unexpected.
             NonFiniteError: NaN or Inf in a weight. ConfigError: `output` exists; a prefix-LM without `allow_causal`.
             On any error nothing is left there.
    """
    output, checkpoint = Path(output), find_checkpoint(checkpoint)
    manifest = open_manifest(checkpoint)
    prefix_lm = attends_prefix(checkpoint, manifest)
    if prefix_lm and not allow_causal:
        raise ConfigError(
            f"{checkpoint} was trained with batch.prefix_lm=true, to read inputs in both directions, and transformers "
            "would read them causally: another model with the same weights. `xmtf evaluate --checkpoint` and `xmtf "
            "generate --checkpoint` run it as trained; `xmtf export --allow-causal` writes the weights all the same."
        )
    mapping = mapping_of(architecture_from_mapping(manifest.architecture))
    with CheckpointReader(checkpoint) as reader, atomic_directory(output) as temporary:
        parameters = match_checkpoint(reader, manifest)
        copy_side_files(checkpoint / "hf", temporary)
        headers = [
            TensorHeader(name, parameter.source_shape, dtype or reader.tensors[parameter.ours].dtype)
            for parameter in parameters
            for name in (*parameter.hf, *(mapping.repeated[name] for name in parameter.hf if name in mapping.repeated))
        ]
        stored = {dtype_name(header.dtype) for header in headers}
        name = stored.pop() if len(stored) == 1 else "mixed"
        _write_config(temporary, name, architecture_class=mapping.architecture_class, prefix_lm=prefix_lm)
        shards = plan_shards(headers)
        again = set(mapping.repeated.values())
        count = sum(torch.Size(header.shape).numel() for header in headers if header.name not in again)
        total = sum(header.bytes for header in headers)
        _write_weights(temporary, shards, reader=reader, parameters=parameters, repeated=mapping.repeated)
        _write_index(temporary, shards, parameters=count)
        card = model_card(
            manifest,
            dtype=name,
            parameters=count,
            architecture_class=mapping.architecture_class,
            prefix_lm=prefix_lm,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    files = tuple(sorted(path.name for path in output.iterdir()))
    return ExportedModel(output, checkpoint, manifest.step, len(headers), count, total, name, files)


def match_checkpoint(reader: CheckpointReader, manifest: CheckpointManifest) -> list[MatchedParameter]:
    """Match every weight of a checkpoint to the names that `save_pretrained` gives it, by name and shape.

    Raises:  CheckpointError: missing, unexpected or misshaped tensors.
    """
    mapping = mapping_of(architecture_from_mapping(manifest.architecture))
    names = [name for name in reader.tensors if not name.startswith(TRAINING_PREFIXES)]
    what = str(reader.directory)
    parameters = match_names(mapping, names=names, what=what, side="ours")
    shapes = {name: reader.tensors[name].shape for name in names}
    check_shapes(parameters, shapes, what=what, side="ours")
    return parameters


def _write_weights(
    directory: Path,
    shards: dict[str, list[TensorHeader]],
    *,
    reader: CheckpointReader,
    parameters: list[MatchedParameter],
    repeated: Mapping[str, str],
) -> None:
    """Write all files of weights at once: what one stored chunk is taken apart into may lie in several."""
    total = sum(header.bytes for shard in shards.values() for header in shard)
    with Progress("export", total=round(total / 1e6), unit="MB") as progress, ExitStack() as stack:
        writers: dict[str, tuple[SafetensorsWriter, torch.dtype]] = {}
        for file_name, shard in shards.items():
            writer = stack.enter_context(SafetensorsWriter(directory / file_name, shard))
            writers.update({header.name: (writer, header.dtype) for header in shard})
        written = 0
        for parameter in parameters:
            for start, end in reader.row_parts(parameter.ours, rows=parameter.shape[0]):
                part = reader.read(parameter.ours, rows=(start, end))
                for name, _, view in parameter.source_views(part, start=start):
                    converted = convert_part(view, dtype=writers[name][1], name=parameter.ours)
                    for target in (name, *([repeated[name]] if name in repeated else [])):
                        writers[target][0].write(target, converted)
                        progress.advance(round((written + converted.nbytes) / 1e6) - round(written / 1e6))
                        written += converted.nbytes


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


def _write_config(directory: Path, dtype: str, *, architecture_class: str, prefix_lm: bool) -> None:
    """Bring the carried config.json up to the written weights; untouched, byte for byte, where it says so already."""
    try:
        config = read_config(directory)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            "the checkpoint carries no hf/config.json, so it cannot be exported; import the model again."
        ) from error
    changed: dict[str, Any] = {}
    if bool(config.get("prefix_lm", False)) != prefix_lm:
        changed["prefix_lm"] = prefix_lm
    if dtype != "mixed" and config_dtype(config) != dtype:
        # `dtype` is the name since transformers 4.56; older ones read `torch_dtype` alone.
        changed["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if architecture_class not in (config.get("architectures") or []):
        changed["architectures"] = [architecture_class]
    if changed:
        text = json.dumps({**config, **changed}, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
