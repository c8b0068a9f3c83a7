"""Checkpoint -> Hugging Face model, streamed a few rows at a time, bit by bit.

    every weight matched, padding cut off, taken apart (`mapping`), written as `save_pretrained` names it

Nothing exists under the output's name before all of it is on the disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest, open_manifest, verify_descriptions
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.conversion.export_parts import ExportPlan, write_weights
from megatron_xmtf.conversion.families import mapping_of
from megatron_xmtf.conversion.huggingface_model import config_dtype, copy_side_files, dtype_name, read_config
from megatron_xmtf.conversion.mapping import MatchedParameter, check_shapes, match_names
from megatron_xmtf.conversion.model_card import model_card
from megatron_xmtf.conversion.safetensors_file import SafetensorsFile, TensorHeader, plan_shards
from megatron_xmtf.data.journal import input_identity
from megatron_xmtf.data.working_directory import working_directory
from megatron_xmtf.errors import ConfigError, CorruptCheckpointError
from megatron_xmtf.files import disk_errors, write_json
from megatron_xmtf.models.architecture import architecture_from_mapping

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
    checkpoint: Path | str,
    output: Path | str,
    *,
    dtype: torch.dtype | None = None,
    allow_causal: bool = False,
    workers: int | None = None,
    restart: bool = False,
    verify: bool = True,
) -> ExportedModel:
    """Write the weights of a checkpoint as `save_pretrained` would, with config, tokenizer files and a model card.

    Memory: a few times `export_parts.AT_HAND_BYTES` in each process, whatever the size of the model and of the stored
    chunks; where a training cut a tensor by columns, one row of a chunk at least.

    Args:    checkpoint: one, or a run directory (its newest). dtype: type to write; None keeps each tensor's own.
             allow_causal: write the weights of a prefix-LM, which `transformers` will run causally; config.json gets
             "prefix_lm": true, and the model card says so. workers: processes; None: two a core where the model is
             large. restart: throw away what an interrupted export left. verify: compare every
             file that is read with its hash in the manifest, not only with its size; that of a training holds
             optimizer state as well.
    Raises:  MissingError, CorruptCheckpointError: not there, not whole. CheckpointError: tensors missing or unexpected.
             NonFiniteError: NaN or Inf in a weight. ConfigError: `output` exists; a prefix-LM without `allow_causal`.
             DatasetError: another export to `output` runs, or an interrupted one was another.
             On any error nothing is left there.
    """
    output, checkpoint = Path(output), find_checkpoint(checkpoint)
    manifest = open_manifest(checkpoint)
    if verify:
        verify_descriptions(checkpoint, manifest)
    prefix_lm = attends_prefix(checkpoint, manifest)
    if prefix_lm and not allow_causal:
        raise ConfigError(
            f"{checkpoint} was trained with batch.prefix_lm=true, to read inputs in both directions, and transformers "
            "would read them causally: another model with the same weights. `xmtf evaluate --checkpoint` and `xmtf "
            "generate --checkpoint` run it as trained; `xmtf export --allow-causal` writes the weights all the same."
        )
    if output.exists():
        raise ConfigError(f"{output} exists already and is not overwritten; remove it or choose another name.")
    mapping = mapping_of(architecture_from_mapping(manifest.architecture))
    with CheckpointReader(checkpoint) as reader:
        parameters = match_checkpoint(reader, manifest)
        in_place = sorted(parameters, key=lambda parameter: reader.first_place(parameter.ours))
        types = {
            name: dtype or reader.tensors[parameter.ours].dtype for parameter in parameters for name in parameter.hf
        }
    repeated = {name: again for name, again in mapping.repeated.items() if name in types}
    types |= {again: types[name] for name, again in repeated.items()}
    headers = [
        TensorHeader(target, parameter.source_shape, types[name])
        for parameter in parameters
        for name in parameter.hf
        for target in (name, *([repeated[name]] if name in repeated else []))
    ]
    stored = {dtype_name(header.dtype) for header in headers}
    name = stored.pop() if len(stored) == 1 else "mixed"
    files = [SafetensorsFile(file_name, shard) for file_name, shard in plan_shards(headers).items()]
    count = sum(math.prod(header.shape) for header in headers if header.name not in repeated.values())
    key = {
        "what": "export",
        "inputs": [input_identity(checkpoint / MANIFEST_NAME)],
        "dtype": str(dtype),
        "files": {file.name: file.bytes for file in files},
    }
    with disk_errors(output), working_directory(output, key=key, restart=restart) as directory:
        plan = ExportPlan(checkpoint, directory.path, in_place, files, types, repeated, manifest if verify else None)
        write_weights(plan, directory, key=key, workers=workers)
        copy_side_files(checkpoint / "hf", directory.path)
        _write_config(directory.path, name, architecture_class=mapping.architecture_class, prefix_lm=prefix_lm)
        _write_index(directory.path, files, parameters=count)
        card = model_card(
            manifest, dtype=name, parameters=count, architecture_class=mapping.architecture_class, prefix_lm=prefix_lm
        )
        (directory.path / "README.md").write_text(card, encoding="utf-8")
        directory.publish(output)
    total = sum(header.bytes for header in headers)
    names = tuple(sorted(path.name for path in output.iterdir()))
    return ExportedModel(output, checkpoint, manifest.step, len(headers), count, total, name, names)


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


def _write_index(directory: Path, files: Sequence[SafetensorsFile], *, parameters: int) -> None:
    if len(files) == 1:
        return
    total = sum(header.bytes for file in files for header in file.headers)
    weight_map = {header.name: file.name for file in files for header in file.headers}
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
