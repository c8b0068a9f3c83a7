"""Where a run of a preset starts: its architecture with the tokenizer's ids, and the checkpoint of random weights.

model=preset:alexatm-20b tokenizer=DIR  ->  OUT/initialized/<of preset, tokenizer and seed>/

A random start is asked for by the word `preset:` alone, never a consequence of something that is missing.
"""

from __future__ import annotations

from pathlib import Path

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import sha256_json
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.presets import PRESETS, preset, with_token_ids

__all__ = ["check_no_bare_preset", "check_positions", "preset_architecture", "preset_checkpoint"]


def preset_architecture(config: RunConfig) -> EncoderDecoderArchitecture:
    """Return the architecture of a run whose model is a preset.

    Raises:  ConfigError: no such preset, or more words than it has rows. TokenizerError: no tokenizer there.
    """
    assert config.preset is not None and config.tokenizer is not None, "the schema asks for both"
    architecture, tokenizer = preset(config.preset), Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.tokenizer} has {tokenizer.vocab_size} words, preset {config.preset} "
            f"{architecture.vocab_size}: a preset takes a tokenizer of at most its size."
        )
    return with_token_ids(architecture, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id)


def preset_checkpoint(config: RunConfig) -> Path:
    """Return the place of a run's initial weights, named after all that they follow from."""
    architecture = preset_architecture(config)
    fingerprint = Tokenizer.load(str(config.tokenizer)).fingerprint
    name = sha256_json([config.preset, architecture.to_mapping(), fingerprint, config.seed])[:16]
    return Path(config.output) / "initialized" / name


def check_no_bare_preset(config: RunConfig) -> None:
    """Refuse a preset's name where a model belongs.

    Raises:  ConfigError: says how a random start is asked for.
    """
    if config.model in PRESETS and not Path(config.model).exists():
        raise ConfigError(
            f"model={config.model} is neither a directory nor a checkpoint, but a preset, which has no weights; to "
            f"start from random ones, give model=preset:{config.model} and tokenizer=DIR."
        )


def check_positions(config: RunConfig, architecture: EncoderDecoderArchitecture) -> None:
    """Check that no example of a row can be longer than the table of learned positions.

    Raises:  ConfigError: names the side.
    """
    for key in ("encoder_length", "decoder_length"):
        length = getattr(config.batch, key)
        if architecture.max_positions is not None and length is not None and length > architecture.max_positions:
            raise ConfigError(
                f"batch.{key}={length} is more than the model's {architecture.max_positions} learned positions, and an "
                f"example may fill a row; use at most {architecture.max_positions}."
            )
