"""What a model is, apart from how it is split: read from a Hugging Face config.json, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.errors import CheckpointError, ConfigError, nearest_names

__all__ = ["VOCAB_DIVISOR", "BloomArchitecture", "architecture_from_hf", "architecture_from_mapping"]

VOCAB_DIVISOR = 128
"""The embedding's rows are a multiple of this, whatever the tensor-parallel size (Megatron-LM's default)."""


@dataclass(frozen=True, kw_only=True)
class BloomArchitecture:
    """A BLOOM: ALiBi, LayerNorm after the embedding, tanh-GELU, biases everywhere, tied output layer."""

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    vocab_size: int
    """Rows of the embedding that the Hugging Face model has."""
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    family: str = "bloom"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of our embedding: `vocab_size` rounded up to a multiple of `VOCAB_DIVISOR`; the extra rows are zero."""
        return -(-self.vocab_size // VOCAB_DIVISOR) * VOCAB_DIVISOR

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the feed-forward layer, four times the hidden size in every BLOOM."""
        return 4 * self.hidden_size

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields as they are kept in a checkpoint's manifest."""
        return asdict(self)

    def check_split(self, parallel: ParallelConfig) -> None:
        """Check that the model can be split as asked.

        Raises:  ConfigError: heads, vocabulary or layers do not divide; names the values and what would.
        """
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        for what, size in (("attention heads", self.num_attention_heads), ("vocabulary rows", self.padded_vocab_size)):
            if size % tp:
                raise ConfigError(
                    f"tensor_model_parallel_size={tp} does not divide the model's {size} {what}; "
                    f"use one of {divisors(size, limit=64)}."
                )
        chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
        if self.num_layers % chunks:
            raise ConfigError(
                f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = {chunks} does not divide the "
                f"model's {self.num_layers} layers; use one of {divisors(self.num_layers, limit=self.num_layers)}."
            )


def divisors(number: int, *, limit: int) -> list[int]:
    """Return the divisors of `number` up to `limit`."""
    return [i for i in range(1, min(number, limit) + 1) if number % i == 0]


def architecture_from_mapping(values: Mapping[str, Any]) -> BloomArchitecture:
    """Rebuild an architecture from a checkpoint's manifest.

    Raises:  CheckpointError: unknown family or fields.
    """
    if values.get("family") != "bloom":
        raise CheckpointError(f"model family {values.get('family')!r} is not known; known: bloom.")
    try:
        return BloomArchitecture(**values)
    except TypeError as error:
        raise CheckpointError(f"the checkpoint's architecture {dict(values)} does not fit: {error}.") from error


def architecture_from_hf(config: Mapping[str, Any]) -> BloomArchitecture:
    """Read an architecture from the contents of a Hugging Face config.json.

    Raises:  CheckpointError: unknown `model_type`, a missing or impossible size, a residual behind the norm.
    """
    model_type = config.get("model_type")
    if model_type != "bloom":
        raise CheckpointError(
            f"model_type {model_type!r} has no family here; {nearest_names(str(model_type), ['bloom'])}."
        )

    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(
            "config.json: apply_residual_connection_post_layernorm=true is not offered: Megatron-Core keeps the "
            "residual before the norm, as every published BLOOM does, and the model would compute something else."
        )

    def size(*names: str) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        raise CheckpointError(f"config.json has no positive integer {' or '.join(names)}.")

    def number(name: str, default: float) -> float:
        value = config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise CheckpointError(f"config.json: {name}={value!r} must be a number from 0 to below 1.")
        return float(value)

    architecture = BloomArchitecture(
        hidden_size=size("hidden_size", "n_embed"),
        num_layers=size("n_layer", "num_hidden_layers"),
        num_attention_heads=size("n_head", "num_attention_heads"),
        vocab_size=size("vocab_size"),
        layernorm_epsilon=number("layer_norm_epsilon", 1e-5),
        hidden_dropout=number("hidden_dropout", 0.0),
        attention_dropout=number("attention_dropout", 0.0),
    )
    if architecture.hidden_size % architecture.num_attention_heads:
        raise CheckpointError(
            f"config.json: hidden_size={architecture.hidden_size} is not a multiple of "
            f"n_head={architecture.num_attention_heads}."
        )
    return architecture
