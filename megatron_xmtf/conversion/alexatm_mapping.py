"""The parameters of an AlexaTM, ours and those of a Blenderbot whose tables of words are three.

ours, in encoder.layers.{i} and decoder.layers.{i}            Hugging Face, in model.encoder.layers.{i} and decoder
input_layernorm, self_attention.linear_qkv, .linear_proj      self_attn_layer_norm, self_attn q_ k_ v_proj, out_proj
pre_cross_attn_layernorm, cross_attention.linear_q,           encoder_attn_layer_norm, encoder_attn q_proj,
  .linear_kv, .linear_proj                                      k_ v_proj, out_proj
pre_mlp_layernorm, mlp.linear_fc1, .linear_fc2                final_layer_norm, fc1, fc2

Each has a weight and a bias. `model.shared.weight` is read by nothing in such a model; it is written once more as the
encoder's table, for otherwise `from_pretrained` reports it missing, and is not read. `final_logits_bias` must be zero.
"""

from __future__ import annotations

from megatron_xmtf.conversion.mapping import FamilyMapping, ParameterRow, Section
from megatron_xmtf.models.alexatm_config import check_has_hf_form
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["alexatm_mapping"]

ENCODER_WORDS = "model.encoder.embed_tokens.weight"
UNREAD = "model.shared.weight"
LOGITS_BIAS = "final_logits_bias"


def _norm(ours: str, hf: str) -> tuple[ParameterRow, ...]:
    return tuple(
        ParameterRow(f"{ours}.{kind}", (f"{hf}.{kind}",), ("hidden",), "replicated") for kind in ("weight", "bias")
    )


def _column(ours: str, hf: tuple[str, ...], rows: str, *, groups: str | None = None) -> tuple[ParameterRow, ...]:
    weights, biases = tuple(f"{name}.weight" for name in hf), tuple(f"{name}.bias" for name in hf)
    return (
        ParameterRow(f"{ours}.weight", weights, (rows, "hidden"), "column rows", groups),
        ParameterRow(f"{ours}.bias", biases, (rows,), "column rows", groups),
    )


def _row(ours: str, hf: str, columns: str) -> tuple[ParameterRow, ...]:
    return (
        ParameterRow(f"{ours}.weight", (f"{hf}.weight",), ("hidden", columns), "row columns"),
        # Added once, behind the sum over ranks: all of them hold it.
        ParameterRow(f"{ours}.bias", (f"{hf}.bias",), ("hidden",), "replicated"),
    )


def _layer(side: str) -> tuple[ParameterRow, ...]:
    """Make the rows of one layer of the encoder or the decoder."""
    ours, hf = f"{side}.layers.{{i}}", f"model.{side}.layers.{{i}}"
    own, across = f"{hf}.self_attn", f"{hf}.encoder_attn"
    qkv = tuple(f"{own}.{name}_proj" for name in "qkv")
    crossing: tuple[ParameterRow, ...] = ()
    if side == "decoder":
        name = f"{ours}.cross_attention"
        crossing = (
            *_norm(f"{ours}.pre_cross_attn_layernorm", f"{hf}.encoder_attn_layer_norm"),
            *_column(f"{name}.linear_q", (f"{across}.q_proj",), "hidden"),
            *_column(f"{name}.linear_kv", (f"{across}.k_proj", f"{across}.v_proj"), "kv", groups="heads"),
            *_row(f"{name}.linear_proj", f"{across}.out_proj", "hidden"),
        )
    return (
        *_norm(f"{ours}.input_layernorm", f"{hf}.self_attn_layer_norm"),
        *_column(f"{ours}.self_attention.linear_qkv", qkv, "qkv", groups="heads"),
        *_row(f"{ours}.self_attention.linear_proj", f"{own}.out_proj", "hidden"),
        *crossing,
        *_norm(f"{ours}.pre_mlp_layernorm", f"{hf}.final_layer_norm"),
        *_column(f"{ours}.mlp.linear_fc1", (f"{hf}.fc1",), "ffn"),
        *_row(f"{ours}.mlp.linear_fc2", f"{hf}.fc2", "ffn"),
    )


def _stack(side: str) -> tuple[Section, ...]:
    """Make the rows of the encoder or the decoder: its tables, its layers, its last norm."""
    ours, hf = f"{side}.embedding", f"model.{side}"
    words, positions = f"{hf}.embed_tokens.weight", f"{hf}.embed_positions.weight"
    tables = (
        ParameterRow(f"{ours}.word_embeddings.weight", (words,), ("vocabulary", "hidden"), "vocabulary rows"),
        ParameterRow(f"{ours}.position_embeddings.weight", (positions,), ("positions", "hidden"), "replicated"),
    )
    norm = _norm(f"{side}.final_layernorm", f"{hf}.layer_norm")
    return Section(tables), Section(_layer(side), layers=f"{side} layers"), Section(norm)


def alexatm_mapping(architecture: EncoderDecoderArchitecture) -> FamilyMapping:
    """Return the parameters of an AlexaTM.

    Raises:  CheckpointError: no class of `transformers` computes the same; names what differs.
    """
    check_has_hf_form(architecture)
    assert architecture.max_positions is not None, "an architecture with learned positions says how many"
    head = ParameterRow("output_layer.weight", ("lm_head.weight",), ("vocabulary", "hidden"), "vocabulary rows")
    return FamilyMapping(
        sections=(*_stack("encoder"), *_stack("decoder"), Section((head,))),
        sizes={
            "encoder layers": architecture.num_encoder_layers,
            "decoder layers": architecture.num_decoder_layers,
            "hidden": architecture.hidden_size,
            "heads": architecture.num_attention_heads,
            "kv": 2 * architecture.hidden_size,
            "qkv": 3 * architecture.hidden_size,
            "ffn": architecture.ffn_hidden_size,
            "positions": architecture.max_positions,
            "vocabulary": architecture.vocab_size,
            "padded vocabulary": architecture.padded_vocab_size,
        },
        embedding="encoder.embedding.word_embeddings.weight",
        copies=(),
        architecture_class="BlenderbotForConditionalGeneration",
        description=(f"an AlexaTM with {architecture.num_encoder_layers} + {architecture.num_decoder_layers} layers"),
        ignored=(UNREAD,),
        zeros=(LOGITS_BIAS,),
        repeated={ENCODER_WORDS: UNREAD},
    )
