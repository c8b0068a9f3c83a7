"""The parameters of a T5 or mT5, ours and Hugging Face's.

ours, in encoder.layers.{i} and decoder.layers.{i}            Hugging Face, in encoder.block.{i}, decoder.block.{i}
input_layernorm, self_attention.linear_qkv, .linear_proj      layer.0: layer_norm, SelfAttention q k v, o
pre_cross_attn_layernorm, cross_attention.linear_q,           layer.1 of the decoder: layer_norm, EncDecAttention
  .linear_kv, .linear_proj                                      q, k v, o
pre_mlp_layernorm, mlp.linear_fc1, .linear_fc2                the last: layer_norm, DenseReluDense wi_0 wi_1 | wi, wo
encoder.relative_attention_bias and the decoder's             the table of block 0, which all blocks share
"""

from __future__ import annotations

from megatron_xmtf.conversion.mapping import FamilyMapping, ParameterRow, Section
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["EMBEDDING_NAMES", "HEAD_NAME", "t5_mapping"]

EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""The one table of embeddings, and the names under which files may hold it again."""
HEAD_NAME = "lm_head.weight"

CLASSES = {"mt5": "MT5ForConditionalGeneration", "t5": "T5ForConditionalGeneration"}

UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
"""In the first published files of T5 1.0; its cross-attention has no positions (`transformers` drops it too)."""


def _norm(ours: str, hf: str) -> ParameterRow:
    return ParameterRow(f"{ours}.weight", (f"{hf}.weight",), ("hidden",), "replicated")


def _self_attention(ours: str, hf: str) -> tuple[ParameterRow, ...]:
    names = tuple(f"{hf}.SelfAttention.{name}.weight" for name in "qkv")
    proj = (f"{hf}.SelfAttention.o.weight",)
    return (
        _norm(f"{ours}.input_layernorm", f"{hf}.layer_norm"),
        ParameterRow(f"{ours}.self_attention.linear_qkv.weight", names, ("qkv", "hidden"), "column rows", "heads"),
        ParameterRow(f"{ours}.self_attention.linear_proj.weight", proj, ("hidden", "attention"), "row columns"),
    )


def _cross_attention(ours: str, hf: str) -> tuple[ParameterRow, ...]:
    query, key, value, proj = (f"{hf}.EncDecAttention.{name}.weight" for name in "qkvo")
    name = f"{ours}.cross_attention"
    return (
        _norm(f"{ours}.pre_cross_attn_layernorm", f"{hf}.layer_norm"),
        ParameterRow(f"{name}.linear_q.weight", (query,), ("attention", "hidden"), "column rows"),
        ParameterRow(f"{name}.linear_kv.weight", (key, value), ("kv", "hidden"), "column rows", "heads"),
        ParameterRow(f"{name}.linear_proj.weight", (proj,), ("hidden", "attention"), "row columns"),
    )


def _feed_forward(ours: str, hf: str, *, gated: bool) -> tuple[ParameterRow, ...]:
    first = ("wi_0", "wi_1") if gated else ("wi",)
    names = tuple(f"{hf}.DenseReluDense.{name}.weight" for name in first)
    second = (f"{hf}.DenseReluDense.wo.weight",)
    return (
        _norm(f"{ours}.pre_mlp_layernorm", f"{hf}.layer_norm"),
        ParameterRow(f"{ours}.mlp.linear_fc1.weight", names, ("fc1", "hidden"), "column rows"),
        ParameterRow(f"{ours}.mlp.linear_fc2.weight", second, ("hidden", "ffn"), "row columns"),
    )


def _stack(name: str, *, gated: bool) -> tuple[Section, Section]:
    """Make the rows of the encoder or the decoder: its layers, and what it has once."""
    ours, hf = f"{name}.layers.{{i}}", f"{name}.block.{{i}}"
    cross = _cross_attention(ours, f"{hf}.layer.1") if name == "decoder" else ()
    last = 2 if name == "decoder" else 1
    rows = (*_self_attention(ours, f"{hf}.layer.0"), *cross, *_feed_forward(ours, f"{hf}.layer.{last}", gated=gated))
    bias = ParameterRow(
        f"{name}.relative_attention_bias.weight",
        (f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
        ("buckets", "heads"),
        "row columns",
    )
    return Section(rows, layers=f"{name} layers"), Section(
        (bias, _norm(f"{name}.final_layernorm", f"{name}.final_layer_norm"))
    )


def t5_mapping(architecture: EncoderDecoderArchitecture) -> FamilyMapping:
    """Return the parameters of a T5 or mT5, with a row for the output layer where it is not the embedding."""
    embedding, table = "embedding.word_embeddings.weight", ("vocabulary", "hidden")
    before = Section((ParameterRow(embedding, EMBEDDING_NAMES[:1], table, "vocabulary rows"),))
    head = Section((ParameterRow("output_layer.weight", (HEAD_NAME,), table, "vocabulary rows"),))
    stacks = [section for name in ("encoder", "decoder") for section in _stack(name, gated=architecture.gated)]
    attention, ffn = architecture.attention_size, architecture.ffn_hidden_size
    return FamilyMapping(
        sections=(before, *stacks, *([] if architecture.tied_head else [head])),
        sizes={
            "encoder layers": architecture.num_encoder_layers,
            "decoder layers": architecture.num_decoder_layers,
            "hidden": architecture.hidden_size,
            "heads": architecture.num_attention_heads,
            "attention": attention,
            "kv": 2 * attention,
            "qkv": 3 * attention,
            "ffn": ffn,
            "fc1": 2 * ffn if architecture.gated else ffn,
            "buckets": architecture.relative_attention_num_buckets,
            "vocabulary": architecture.vocab_size,
            "padded vocabulary": architecture.padded_vocab_size,
        },
        embedding=embedding,
        copies=(*EMBEDDING_NAMES[1:], *([HEAD_NAME] if architecture.tied_head else [])),
        architecture_class=CLASSES[architecture.family],
        description=(
            f"a {architecture.family} with {architecture.num_encoder_layers} + {architecture.num_decoder_layers} layers"
        ),
        alternatives=EMBEDDING_NAMES[1:],
        ignored=(UNUSED,),
    )
