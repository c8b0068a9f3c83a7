"""What an encoder-decoder is, apart from how it is split: mT5, T5 v1.1 and Flan-T5, T5 1.0, AlexaTM.

                       mT5, T5 v1.1, Flan-T5    T5 1.0                        AlexaTM
    feed_forward       gated_gelu (tanh)        relu                          gelu
    norm, linear_bias  rms, no                  rms, no                       layernorm, yes
    positions          relative                 relative                      learned
    attention_scaling  no                       no                            yes
    tied_embeddings    yes                      yes                           no
    tied_head          no                       yes                           no
    scaled_head        no                       yes, by hidden_size^-0.5      no

Source:  Raffel et al. 2020 (T5); Shazeer 2020 (gated GELU, T5 v1.1); Xue et al. 2021 (mT5); Soltan et al. 2022 (AlexaTM
         20B); `transformers` 5.23 T5Config, MT5Config and their models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.config_fields import read_fraction, read_size, read_token_id
from megatron_xmtf.models.split_sizes import check_tensor_parallel, padded_rows

__all__ = ["EncoderDecoderArchitecture", "t5_from_hf"]

FEED_FORWARDS: dict[str, Literal["gated_gelu", "relu"]] = {"gated-gelu": "gated_gelu", "relu": "relu"}
"""`feed_forward_proj` of a config.json -> ours. `transformers` makes the tanh form of GELU of "gated-gelu"."""
ACTIVATIONS = {"gated_gelu": "gelu_new", "relu": "relu"}
"""Ours -> the `dense_act_fn` that `transformers` writes beside it."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderArchitecture:
    """An encoder and a decoder that attends to it; pre-norm residual layers, softmax over the vocabulary."""

    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_attention_heads: int
    head_dim: int
    """Width of one head (`d_kv`); heads x head_dim need not be the hidden size."""
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding that the Hugging Face model has."""
    layernorm_epsilon: float = 1e-6
    dropout: float = 0.0
    """One rate everywhere (`dropout_rate`): embeddings, attention weights, feed-forward, residuals, after the norms."""
    feed_forward: Literal["gated_gelu", "relu", "gelu"] = "gated_gelu"
    """`gated_gelu`: tanh-GELU(wi_0 x) * wi_1 x. `relu` and `gelu` (AlexaTM, tanh form): one first layer."""
    norm: Literal["rms", "layernorm"] = "rms"
    positions: Literal["relative", "learned"] = "relative"
    linear_bias: bool = False
    attention_scaling: bool = False
    """Whether scores are divided by sqrt(head_dim); T5 leaves that to its initial weights."""
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    max_positions: int | None = None
    """Rows of the table of learned positions; None without one."""
    tied_embeddings: bool = True
    """One table for the tokens of the encoder and of the decoder."""
    tied_head: bool = False
    """The output layer is the (decoder's) table of embeddings."""
    scaled_head: bool = False
    """The decoder's output is multiplied by hidden_size^-0.5 before the output layer."""
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    family: Literal["t5", "mt5", "alexatm"] = "mt5"

    @property
    def num_layers(self) -> int:
        """Layers of both stacks, in the order of the forward pass: encoder, then decoder."""
        return self.num_encoder_layers + self.num_decoder_layers

    @property
    def attention_size(self) -> int:
        """Width of all heads together: rows of the query's weight."""
        return self.num_attention_heads * self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the first feed-forward layer has two halves, gate (`wi_0`) and value (`wi_1`)."""
        return self.feed_forward == "gated_gelu"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of our embedding: `vocab_size` rounded up to a multiple of 128; the extra rows are zero."""
        return padded_rows(self.vocab_size)

    @property
    def head_scale(self) -> float:
        """What the decoder's output is multiplied by before the output layer."""
        return float(self.hidden_size**-0.5) if self.scaled_head else 1.0

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields as they are kept in a checkpoint's manifest."""
        return asdict(self)

    def check_split(self, parallel: ParallelConfig) -> None:
        """Check that the model can be split as asked.

        Raises:  ConfigError: heads, feed-forward or vocabulary do not divide, or a stage would have no layer.
        """
        sizes = {
            "attention heads": self.num_attention_heads,
            "feed-forward columns": self.ffn_hidden_size,
            "vocabulary rows": self.padded_vocab_size,
        }
        check_tensor_parallel(parallel.tensor_model_parallel_size, sizes=sizes)
        if parallel.uneven_keys:
            raise ConfigError(
                f"parallel.{parallel.uneven_keys[0]} is for decoder models; an encoder-decoder's layers are cut by "
                "cost, or as parallel.pipeline_layers says."
            )
        given = parallel.pipeline_layers
        if given is not None and sum(given) != self.num_layers:
            raise ConfigError(
                f"parallel.pipeline_layers={given} adds up to {sum(given)}, the model has {self.num_encoder_layers} + "
                f"{self.num_decoder_layers} = {self.num_layers} layers."
            )
        chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
        if given is None and chunks > self.num_layers:
            raise ConfigError(
                f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = {chunks} is more than the "
                f"model's {self.num_encoder_layers} + {self.num_decoder_layers} = {self.num_layers} layers."
            )

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, unpadded, each tied table once, as the Hugging Face model has them.

        mT5-small (512 wide, 8 + 8 layers of 6 heads of 64, feed-forward 1024, 250,112 words): 300,176,768.
        """
        hidden, bias, inner = self.hidden_size, int(self.linear_bias), self.attention_size
        norm = hidden * (2 if self.norm == "layernorm" else 1)
        attention = norm + 4 * hidden * inner + bias * (3 * inner + hidden)
        first = self.ffn_hidden_size * (2 if self.gated else 1)
        feed_forward = norm + hidden * (first + self.ffn_hidden_size) + bias * (first + hidden)
        layers = self.num_encoder_layers * (attention + feed_forward)
        layers += self.num_decoder_layers * (2 * attention + feed_forward)
        tables = (1 if self.tied_embeddings else 2) + (0 if self.tied_head else 1)
        if self.positions == "relative":
            positions = 2 * self.relative_attention_num_buckets * self.num_attention_heads
        else:
            positions = 2 * (self.max_positions or 0) * hidden
        return tables * self.vocab_size * hidden + layers + 2 * norm + positions


def t5_from_hf(config: Mapping[str, Any], *, head_differs: bool | None = None) -> EncoderDecoderArchitecture:
    """Read a T5 or mT5 from the contents of a Hugging Face config.json.

    `transformers` 5 forces `tie_word_embeddings` to true when it reads these two, and writes it so; a model is tied
    unless its files hold an output layer that differs from the embedding. For T5 the published value lives on in
    `scale_decoder_outputs`; an mT5 scales nothing.

        published or saved by `transformers`          tied_head            scaled_head
        T5 1.0        tie true, no lm_head            yes                  yes
        T5 v1.1       tie false, lm_head              no                   no
        T5 v1.1 by 5  tie true, scale false, lm_head  no, by the files     no
        mT5 by 5      tie true, lm_head               no, by the files     no

    Args:    head_differs: whether the files hold such an output layer; None where only the config.json is at hand:
             then `tie_word_embeddings` decides.
    Raises:  CheckpointError: a missing or impossible field; a feed-forward that is not offered; a decoder alone.
    """
    family = config["model_type"]
    for name, wanted in (("is_encoder_decoder", True), ("is_decoder", False)):
        if config.get(name, wanted) is not wanted:
            raise CheckpointError(f"config.json: {name}={config[name]!r}: only whole encoder-decoders are converted.")
    feed_forward = _feed_forward(config, default="gated-gelu" if family == "mt5" else "relu")
    vocab_size = read_size(config, "vocab_size")
    layers = read_size(config, "num_layers", "num_hidden_layers")
    decoder_layers = layers if config.get("num_decoder_layers") is None else read_size(config, "num_decoder_layers")
    buckets, distance = _relative_positions(config)
    tied = _flag(config, "tie_word_embeddings", default=True)
    scaled = family == "t5" and _flag(config, "scale_decoder_outputs", default=tied)
    return EncoderDecoderArchitecture(
        hidden_size=read_size(config, "d_model", "hidden_size"),
        num_encoder_layers=layers,
        num_decoder_layers=decoder_layers,
        num_attention_heads=read_size(config, "num_heads", "num_attention_heads"),
        head_dim=read_size(config, "d_kv", "head_dim"),
        ffn_hidden_size=read_size(config, "d_ff"),
        vocab_size=vocab_size,
        layernorm_epsilon=read_fraction(config, "layer_norm_epsilon", default=1e-6),
        dropout=read_fraction(config, "dropout_rate", default=0.1),
        feed_forward=feed_forward,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        tied_head=tied if head_differs is None else not head_differs,
        scaled_head=scaled,
        pad_token_id=read_token_id(config, "pad_token_id", default=0, vocab_size=vocab_size),
        eos_token_id=read_token_id(config, "eos_token_id", default=1, vocab_size=vocab_size),
        decoder_start_token_id=read_token_id(
            config, "decoder_start_token_id", default=0 if family == "mt5" else None, vocab_size=vocab_size
        ),
        family=family,
    )


def _flag(config: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name}={value!r} must be true or false.")
    return value


def _relative_positions(config: Mapping[str, Any]) -> tuple[int, int]:
    """Read buckets and largest distance; the logarithm between the two needs room."""
    read = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, **config}
    buckets, distance = (
        read_size(read, "relative_attention_num_buckets"),
        read_size(read, "relative_attention_max_distance"),
    )
    if buckets < 4 or distance <= buckets // 2:
        raise CheckpointError(
            f"config.json: relative_attention_num_buckets={buckets} must be at least 4, and half of it less than "
            f"relative_attention_max_distance={distance}."
        )
    return buckets, distance


def _feed_forward(config: Mapping[str, Any], *, default: str) -> Literal["gated_gelu", "relu"]:
    """Read the feed-forward, and check the two fields that `transformers` derives from it and writes beside it.

    Raises:  CheckpointError: another one than is offered, or fields that contradict each other.
    """
    value = config.get("feed_forward_proj", default)
    if not isinstance(value, str) or value not in FEED_FORWARDS:
        raise CheckpointError(
            f"config.json: feed_forward_proj={value!r} is not offered; offered: {', '.join(FEED_FORWARDS)}."
        )
    feed_forward = FEED_FORWARDS[value]
    for name, wanted in (("is_gated_act", value == "gated-gelu"), ("dense_act_fn", ACTIVATIONS[feed_forward])):
        if config.get(name, wanted) != wanted:
            raise CheckpointError(f"config.json: {name}={config[name]!r} contradicts feed_forward_proj={value!r}.")
    return feed_forward
