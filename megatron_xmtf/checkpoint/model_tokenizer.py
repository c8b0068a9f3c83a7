"""The tokenizer of a run's model, wherever that lies."""

from __future__ import annotations

from pathlib import Path

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.tokenizer import Tokenizer

__all__ = ["load_model_tokenizer", "objective_tokenizer"]


def load_model_tokenizer(model: str) -> Tokenizer:
    """Load the tokenizer of `model`: a Hugging Face directory, a checkpoint, a run, or a tokenizer alone.

    Raises:  MissingError: nothing there. TokenizerError: it cannot be read.
    """
    directory = Path(model)
    if (directory / "config.json").is_file() or (directory / "tokenizer.json").is_file():
        return Tokenizer.load(directory)
    return Tokenizer.load(find_checkpoint(directory) / "hf")


def objective_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Load the tokenizer if a dataset is read under an objective, whose special tokens it has; None: none is.

    Raises:  as `load_model_tokenizer`.
    """
    entries = [*config.data.training_datasets, *config.data.validation_datasets]
    has_objective = any(entry.objective is not None for entry in entries)
    return load_model_tokenizer(config.tokenizer_source) if has_objective else None
