"""Evaluate, or continue prompts with, a checkpoint on local ranks or a Hugging Face directory.

A model runs in processes of its own (`parallel.launch`), so that the caller can start more of them later: torch's
threads do not survive a fork. Under torchrun or srun this process is a rank already, and every rank returns the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.checkpoint.reading_direction import attends_prefix
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.evaluation.ask import check_vocabulary, evaluate_tasks
from megatron_xmtf.evaluation.backend import Backend
from megatron_xmtf.evaluation.generate import generate_texts
from megatron_xmtf.evaluation.results import EvaluatedModel, TaskResult
from megatron_xmtf.evaluation.tasks import Task
from megatron_xmtf.files import require_directory, require_file, sha256_json
from megatron_xmtf.parallel.launch import joined_by_launcher, run_ranks
from megatron_xmtf.progress import Progress

__all__ = [
    "describe_checkpoint",
    "evaluate_checkpoint",
    "evaluate_huggingface",
    "generate_checkpoint",
    "generate_huggingface",
]

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]


def evaluate_checkpoint(
    checkpoint: Path | str,
    tasks: Sequence[Task],
    *,
    parallel: ParallelConfig,
    world_size: int,
    precision: Precision = "fp32",
) -> list[TaskResult]:
    """Evaluate a checkpoint split over `world_size` local ranks; the tokenizer is the one in its `hf/`.

    Args:    checkpoint: one, or a run directory (its newest). parallel: sizes, any that divide the model.
    Raises:  MissingError, CorruptCheckpointError, ConfigError (impossible sizes), TokenizerError, RecordError.
    """
    path = find_checkpoint(checkpoint)
    return _in_ranks(_on_checkpoint, world_size, (path, parallel, precision, _evaluate, (list(tasks),)))


def evaluate_huggingface(directory: Path | str, tasks: Sequence[Task], *, own_process: bool = True) -> list[TaskResult]:
    """Evaluate a model in a Hugging Face directory with transformers.

    Args:    own_process: False saves the start of another process where the caller starts none afterwards.
    Raises:  MissingError, CheckpointError (transformers cannot read it), TokenizerError, RecordError.
    """
    arguments = (_whole_directory(directory), _evaluate, (list(tasks),))
    return _in_ranks(_on_huggingface, 1, arguments) if own_process else _on_huggingface(*arguments)


def generate_checkpoint(
    checkpoint: Path | str,
    prompts: Sequence[str],
    *,
    parallel: ParallelConfig,
    world_size: int,
    max_new_tokens: int = 64,
    precision: Precision = "fp32",
) -> list[str]:
    """Continue prompts greedily with a checkpoint (arguments as `evaluate_checkpoint`)."""
    path = find_checkpoint(checkpoint)
    return _in_ranks(
        _on_checkpoint, world_size, (path, parallel, precision, _generate, (list(prompts), max_new_tokens))
    )


def generate_huggingface(
    directory: Path | str, prompts: Sequence[str], *, max_new_tokens: int = 64, own_process: bool = True
) -> list[str]:
    """Continue prompts greedily with a Hugging Face directory (as `evaluate_huggingface`)."""
    arguments = (_whole_directory(directory), _generate, (list(prompts), max_new_tokens))
    return _in_ranks(_on_huggingface, 1, arguments) if own_process else _on_huggingface(*arguments)


def describe_checkpoint(checkpoint: Path | str) -> EvaluatedModel:
    """Say which checkpoint a path means: its step, and the hash of the configuration that trained it."""
    path = find_checkpoint(checkpoint)
    manifest = open_manifest(path)
    config_hash = None if manifest.config is None else sha256_json(manifest.config)
    return EvaluatedModel(model=str(path), step=manifest.step, config_hash=config_hash)


def _whole_directory(directory: Path | str) -> Path:
    """Check before a process is started what can be checked by looking."""
    directory = require_directory(directory)
    require_file(directory / "config.json")
    return directory


def _in_ranks(function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...]) -> Any:
    """Run in local ranks and return what rank 0 returned, or join the launcher's ranks."""
    if joined_by_launcher():
        return function(*arguments)
    return run_ranks(function, world_size=world_size, arguments=arguments)[0]


def _on_checkpoint(
    checkpoint: Path,
    parallel: ParallelConfig,
    precision: Precision,
    ask: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    """Build this rank's part of the model, load its weights, and ask."""
    from megatron_xmtf.checkpoint.sharded import load_model_weights
    from megatron_xmtf.evaluation.megatron import MegatronBackend
    from megatron_xmtf.evaluation.megatron_encoder_decoder import EncoderDecoderMegatronBackend
    from megatron_xmtf.models.architecture import EncoderDecoderArchitecture, architecture_from_mapping
    from megatron_xmtf.models.registry import build_model
    from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel

    tokenizer = Tokenizer.load(checkpoint / "hf")
    topology = initialize_parallel(parallel, seed=0)
    try:
        manifest = open_manifest(checkpoint)
        architecture = architecture_from_mapping(manifest.architecture)
        chunks = build_model(architecture, parallel=parallel, precision=precision)
        load_model_weights(chunks, checkpoint)
        backend = MegatronBackend(chunks, pad_id=tokenizer.pad_id, prefix_lm=attends_prefix(checkpoint, manifest))
        if isinstance(architecture, EncoderDecoderArchitecture):
            encoder_eos = (manifest.config or {}).get("batch", {}).get("encoder_eos", True)
            backend = EncoderDecoderMegatronBackend(
                chunks, pad_id=tokenizer.pad_id, inputs_end_with_eos=bool(encoder_eos)
            )
        return ask(*arguments, backend=backend, tokenizer=tokenizer, show_progress=topology.rank == 0)
    finally:
        destroy_parallel()


def _on_huggingface(directory: Path, ask: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from megatron_xmtf.evaluation.huggingface import HuggingFaceBackend

    tokenizer = Tokenizer.load(directory)
    return ask(*arguments, backend=HuggingFaceBackend.load(directory), tokenizer=tokenizer, show_progress=True)


def _evaluate(tasks: list[Task], *, backend: Backend, tokenizer: Tokenizer, show_progress: bool) -> list[TaskResult]:
    return evaluate_tasks(tasks, backend=backend, tokenizer=tokenizer, show_progress=show_progress)


def _generate(
    prompts: list[str], max_new_tokens: int, *, backend: Backend, tokenizer: Tokenizer, show_progress: bool
) -> list[str]:
    check_vocabulary(tokenizer, backend)
    with Progress("generate", total=len(prompts), unit="prompts", enabled=show_progress) as progress:
        texts, truncated = generate_texts(
            prompts, backend=backend, tokenizer=tokenizer, max_new_tokens=max_new_tokens, advance=progress.advance
        )
    if truncated and show_progress:
        logger.warning(
            "%d of %d prompts lost their beginning: with %d new tokens they exceed the %d tokens that the model takes.",
            len(truncated),
            len(prompts),
            max_new_tokens,
            backend.max_length,
        )
    return texts
