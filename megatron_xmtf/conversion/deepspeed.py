"""BigScience's Megatron-DeepSpeed checkpoint of a BLOOM -> checkpoint of step 0, streamed a few rows at a time.

    settings (`deepspeed_layout`) or a config.json; slices put together (`deepspeed_source`); `checkpoint_parts` writes

Nothing exists under the output's name before all of it is on the disk. The way back is `deepspeed_export`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.conversion.checkpoint_parts import CheckpointDescription, write_checkpoint
from megatron_xmtf.conversion.deepspeed_layout import (
    DeepSpeedDirectory,
    find_deepspeed,
    read_settings,
    settings_to_hf,
)
from megatron_xmtf.conversion.deepspeed_source import DeepSpeedSource, WeightSource, open_slices, stored_rows
from megatron_xmtf.conversion.huggingface_model import check_side_files, copy_side_files, read_config
from megatron_xmtf.conversion.replicas import ReplicaRule
from megatron_xmtf.conversion.tensor_source import common_dtype
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.files import require_directory, write_json
from megatron_xmtf.models.bloom_architecture import bloom_from_hf

__all__ = [
    "ImportedDeepSpeed",
    "WeightSource",
    "check_side_sources",
    "given_config",
    "import_deepspeed",
    "write_side_files",
]


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
    workers: int | None = None,
    restart: bool = False,
) -> ImportedDeepSpeed:
    """Turn a checkpoint of Megatron-DeepSpeed's pipeline into a checkpoint of step 0.

    Memory: a few times `row_ranges.CHUNK_BYTES` in each process. All bytes of the files that hold what is read are
    compared with their checksums.

    Args:    directory: of a step, or the one above with `latest`. config: a BLOOM's config.json or a directory with
             it; None: by the run's own settings. tokenizer: directory whose tokenizer files go along.
             vocab_size: rows of the embedding to keep; None: as `config` says, or all, as the published models do.
             weights: which values are taken. replicas: what becomes of copies that differ. dtype: type to store;
             None keeps the files'. workers, restart: as in `write_checkpoint`.
    Raises:  MissingError, CheckpointError, CorruptCheckpointError: not there, not a BLOOM, not whole; file and tensor
             are named. NonFiniteError: NaN or Inf. ConfigError: `output` exists. On any error nothing is left there.
    """
    output, found = Path(output), find_deepspeed(directory)
    slices, read = open_slices(found, weights)
    if config is None:
        settings = read_settings(found.path)
        values, iteration = settings_to_hf(settings, what=found.path), settings.iteration
    else:
        values, iteration = given_config(Path(config)), None
    rows = stored_rows(slices, found.path, hidden_size=values.get("hidden_size", values.get("n_embed")))
    values["vocab_size"] = vocab_size or values.get("vocab_size", rows)
    architecture = bloom_from_hf(values)
    open_source = partial(DeepSpeedSource, found, architecture, weights=weights, replicas=replicas, dtype=dtype)
    check_side_sources(config, tokenizer)
    with open_source() as source:
        parameters, total = source.parameters, source.stored_bytes
        stored, vocabulary = common_dtype(source.tensors), architecture.vocab_size
        written = write_checkpoint(
            output,
            source,
            open_source,
            describe=CheckpointDescription(
                architecture.to_mapping(),
                origin={
                    "format": "megatron-deepspeed",
                    "name": found.path.name,
                    "iteration": iteration,
                    "weights": read,
                    "replicas": replicas,
                },
            ),
            add_files=lambda path: write_side_files(path / "hf", values, stored, config=config, tokenizer=tokenizer),
            settings={
                "dtype": str(dtype),
                "weights": read,
                "replicas": replicas,
                "vocab_size": vocabulary,
            },
            workers=workers,
            restart=restart,
        )
    worst = max(written.notes, key=lambda place: written.notes[place], default=None)
    return ImportedDeepSpeed(
        checkpoint=output,
        source=found.path,
        read=read,
        tensors=len(parameters),
        parameters=sum(math.prod(parameter.shape) for parameter in parameters),
        bytes=total,
        dtype=written.dtype,
        tensor_parallel_size=slices.tensor_parallel_size,
        iteration=iteration,
        dropped_vocabulary_rows=rows - vocabulary,
        differing_replicas=len(written.notes),
        max_replica_drift=0.0 if worst is None else written.notes[worst],
        worst_replica=worst,
        left_out=_left_out(found, weights),
    )


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


def check_side_sources(config: Path | str | None, tokenizer: Path | str | None) -> None:
    """Check what `write_side_files` will read, before the weights are.

    Raises:  MissingError: no such directory. ConfigError: a file that leads outside, or is no JSON.
    """
    if config is not None and Path(config).is_dir():
        check_side_files(Path(config))
    if tokenizer is not None:
        check_side_files(require_directory(tokenizer))


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
