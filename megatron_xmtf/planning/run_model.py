"""Which model a configuration is about, read without torch; a recipe that names none is about the one it is called by.

    bloomz-176b   BLOOM, 70 layers, 14,336 wide, 112 heads       mt0-xl   mT5, 24 + 24 layers, 2,048 wide, 32 heads

Source:  config.json of bigscience/bloom*, google/mt5-*, google/flan-t5-* on the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, open_manifest
from megatron_xmtf.config.load import load_config, load_yaml
from megatron_xmtf.config.recipe import config_path
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import CheckpointError, ConfigError, MissingError
from megatron_xmtf.files import require_file
from megatron_xmtf.models.architecture import (
    Architecture,
    BloomArchitecture,
    EncoderDecoderArchitecture,
    architecture_from_hf,
    architecture_from_mapping,
)
from megatron_xmtf.models.presets import preset

__all__ = ["PUBLISHED", "load_plan_config", "run_architecture"]


def _bloom(hidden: int, layers: int, heads: int) -> BloomArchitecture:
    return BloomArchitecture(hidden_size=hidden, num_layers=layers, num_attention_heads=heads, vocab_size=250_880)


def _t5(hidden: int, ffn: int, layers: int, heads: int, *, vocab_size: int) -> EncoderDecoderArchitecture:
    return EncoderDecoderArchitecture(
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        num_attention_heads=heads,
        head_dim=64,
        vocab_size=vocab_size,
        family="mt5" if vocab_size == 250_112 else "t5",
    )


_T5_SIZES = {
    # hidden_size, ffn_hidden_size, layers of each side, heads
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
PUBLISHED: dict[str, Architecture] = {
    "bloomz-560m": _bloom(1024, 24, 16),
    "bloomz-1b1": _bloom(1536, 24, 16),
    "bloomz-1b7": _bloom(2048, 24, 16),
    "bloomz-3b": _bloom(2560, 30, 32),
    "bloomz-7b1": _bloom(4096, 30, 32),
    "bloomz-176b": _bloom(14336, 70, 112),
    **{f"mt0-{size}": _t5(*shape, vocab_size=250_112) for size, shape in _T5_SIZES.items()},
    **{f"flan-t5-{size}": _t5(*shape, vocab_size=32_128) for size, shape in _T5_SIZES.items()},
}
"""Recipes that name no model -> the published model that they are for."""
UNNAMED = "(published)"


def load_plan_config(name: str, overrides: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Read a configuration that may lack what only a run needs.

    Returns: the configuration, and the keys among `model` and `output` that nobody gave.
    Raises:  as `load_config`.
    """
    values = load_yaml(config_path(name))
    given = {override.partition("=")[0] for override in overrides}
    missing = [
        key for key in ("model", "output") if key not in given and (not isinstance(values, dict) or key not in values)
    ]
    return load_config(name, [*(f"{key}={UNNAMED}" for key in missing), *overrides]), missing


def run_architecture(name: str, config: RunConfig) -> Architecture:
    """Return the architecture of a run's model: a preset, a directory, a checkpoint, or the recipe's own.

    Args:    name: of the configuration, as the user gave it.
    Raises:  ConfigError: no model is named and the configuration is no recipe that is for one.
             MissingError, CheckpointError: the model's directory cannot be read.
    """
    if config.preset is not None:
        return preset(config.preset)
    if config.model == UNNAMED:
        if name not in PUBLISHED:
            raise ConfigError(f"{name} names no model, so there is nothing to plan for; add model=DIR.")
        return PUBLISHED[name]
    directory = Path(config.model)
    if not directory.is_dir():
        raise MissingError(f"model={config.model} is no directory; name one with config.json, or a checkpoint.")
    if (directory / MANIFEST_NAME).is_file():
        return architecture_from_mapping(open_manifest(directory).architecture)
    path = require_file(directory / "config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from error
    return architecture_from_hf(values)
