"""What a BLOOM is, apart from how it is split: read from a Hugging Face config.json, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.config_fields import read_fraction, read_size
from megatron_xmtf.models.split_sizes import check_tensor_parallel, divisors, padded_rows

__all__ = ["BloomArchitecture", "bloom_from_hf"]


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
        """Rows of our embedding: `vocab_size` rounded up to a multiple of 128; the extra rows are zero."""
        return padded_rows(self.vocab_size)

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
        sizes = {"attention heads": self.num_attention_heads, "vocabulary rows": self.padded_vocab_size}
        check_tensor_parallel(parallel.tensor_model_parallel_size, sizes=sizes)
        if parallel.pipeline_layers is not None:
            raise ConfigError(
                "parallel.pipeline_layers is for encoder-decoders; a BLOOM's stages share the layers evenly, but for "
                "parallel.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage."
            )
        self.chunk_layers(parallel)

    def chunk_layers(self, parallel: ParallelConfig) -> list[list[int]]:
        """Return how many layers each model chunk of each pipeline stage holds.

            70 layers, 72 stages, embedding and loss counted    [[0], [1], [1], ... [1], [0]]
            4 layers, 2 stages, 1 given in the first            [[1], [3]]
            8 layers, 2 stages of 2 chunks                      [[2, 2], [2, 2]]

        Raises:  ConfigError: the layers do not divide; names the values and what would.
        """
        stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
        first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
        if first is not None or last is not None:
            return [[count // chunks] * chunks for count in self._given_layers(stages, chunks, first, last)]
        embedding, loss = parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split
        counted = self.num_layers + embedding + loss
        if counted % (stages * chunks):
            layers = f"{self.num_layers} layers"
            if counted > self.num_layers:
                layers += f" + {counted - self.num_layers} for embedding and loss = {counted}"
            raise ConfigError(
                f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = {stages * chunks} does not "
                f"divide the model's {layers}; use one of {divisors(counted, limit=counted)}."
            )
        split = [[counted // (stages * chunks)] * chunks for _ in range(stages)]
        split[0][0] -= embedding
        split[-1][-1] -= loss
        return split

    def _given_layers(self, stages: int, chunks: int, first: int | None, last: int | None) -> list[int]:
        """Return the layers of each stage when those of the first, the last or both are given."""
        given = (first or 0) + (last or 0)
        left = stages - (first is not None) - (last is not None)
        rest = self.num_layers - given
        # Without stages between the two, they must hold everything: Megatron-Core would leave the rest out.
        if rest < 0 or (rest % left or rest == 0 if left else rest != 0):
            raise ConfigError(
                f"num_layers_in_first_pipeline_stage={first} and num_layers_in_last_pipeline_stage={last} leave {rest} "
                f"of the model's {self.num_layers} layers to {left} stages, which must share them evenly."
            )
        split = [rest // left if left else 0] * stages
        if first is not None:
            split[0] = first
        if last is not None:
            split[-1] = last
        if any(count % chunks for count in split):
            raise ConfigError(
                f"stages of {', '.join(map(str, sorted(set(split))))} layers cannot be cut into "
                f"virtual_pipeline_model_parallel_size={chunks} chunks of the same size."
            )
        return split

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, tied and unpadded, as the Hugging Face model has them.

        vocab h (embedding) + 2h (its norm) + layers (12 h^2 + 13 h) + 2h (last norm); BLOOM-176B: 176,247,271,424.
        """
        hidden = self.hidden_size
        return self.vocab_size * hidden + self.num_layers * (12 * hidden**2 + 13 * hidden) + 4 * hidden


def bloom_from_hf(config: Mapping[str, Any]) -> BloomArchitecture:
    """Read a BLOOM from the contents of a Hugging Face config.json.

    Raises:  CheckpointError: a missing or impossible size, a residual behind the norm, an output layer of its own.
    """
    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(
            "config.json: apply_residual_connection_post_layernorm=true is not offered: Megatron-Core keeps the "
            "residual before the norm, as every published BLOOM does, and the model would compute something else."
        )
    if config.get("tie_word_embeddings", True) is not True:
        raise CheckpointError(
            "config.json: tie_word_embeddings=false: a BLOOM's output layer is always the embedding here."
        )
    architecture = BloomArchitecture(
        hidden_size=read_size(config, "hidden_size", "n_embed"),
        num_layers=read_size(config, "n_layer", "num_hidden_layers"),
        num_attention_heads=read_size(config, "n_head", "num_attention_heads"),
        vocab_size=read_size(config, "vocab_size"),
        layernorm_epsilon=read_fraction(config, "layer_norm_epsilon", default=1e-5),
        hidden_dropout=read_fraction(config, "hidden_dropout", default=0.0),
        attention_dropout=read_fraction(config, "attention_dropout", default=0.0),
    )
    if architecture.hidden_size % architecture.num_attention_heads:
        raise CheckpointError(
            f"config.json: hidden_size={architecture.hidden_size} is not a multiple of "
            f"n_head={architecture.num_attention_heads}."
        )
    return architecture
