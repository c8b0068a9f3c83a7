"""The parameters of a BLOOM, ours and Hugging Face's.

QKV rows are [heads, 3, head_dim] on both sides, so every row is a plain copy; only the vocabulary is padded.
"""

from __future__ import annotations

from megatron_xmtf.conversion.mapping import FamilyMapping, ParameterRow, Section, Split
from megatron_xmtf.models.bloom_architecture import BloomArchitecture

__all__ = ["bloom_mapping"]


def _linear(ours: str, hf: str, weight: tuple[str, str], split: Split) -> tuple[ParameterRow, ParameterRow]:
    """Make the weight's and the bias's row of a linear layer."""
    bias_split: Split = "column rows" if split == "column rows" else "replicated"
    return (
        ParameterRow(f"{ours}.weight", (f"{hf}.weight",), weight, split),
        ParameterRow(f"{ours}.bias", (f"{hf}.bias",), weight[:1], bias_split),
    )


def _norm(ours: str, hf: str) -> tuple[ParameterRow, ParameterRow]:
    """Make both rows of a LayerNorm."""
    return (
        ParameterRow(f"{ours}.weight", (f"{hf}.weight",), ("hidden",), "replicated"),
        ParameterRow(f"{ours}.bias", (f"{hf}.bias",), ("hidden",), "replicated"),
    )


_OURS, _HF = "decoder.layers.{i}", "h.{i}"
_ATTENTION = "self_attention"
_TABLE = ("vocabulary", "hidden")

BEFORE = Section(
    (
        ParameterRow("embedding.word_embeddings.weight", ("word_embeddings.weight",), _TABLE, "vocabulary rows"),
        *_norm("embedding.layernorm", "word_embeddings_layernorm"),
    )
)
LAYER = Section(
    (
        *_norm(f"{_OURS}.input_layernorm", f"{_HF}.input_layernorm"),
        *_linear(
            f"{_OURS}.{_ATTENTION}.linear_qkv", f"{_HF}.{_ATTENTION}.query_key_value", ("qkv", "hidden"), "column rows"
        ),
        *_linear(f"{_OURS}.{_ATTENTION}.linear_proj", f"{_HF}.{_ATTENTION}.dense", ("hidden", "hidden"), "row columns"),
        *_norm(f"{_OURS}.pre_mlp_layernorm", f"{_HF}.post_attention_layernorm"),
        *_linear(f"{_OURS}.mlp.linear_fc1", f"{_HF}.mlp.dense_h_to_4h", ("ffn", "hidden"), "column rows"),
        *_linear(f"{_OURS}.mlp.linear_fc2", f"{_HF}.mlp.dense_4h_to_h", ("hidden", "ffn"), "row columns"),
    ),
    layers="layers",
)
AFTER = Section(_norm("decoder.final_layernorm", "ln_f"))


def bloom_mapping(architecture: BloomArchitecture) -> FamilyMapping:
    """Return the parameters of a BLOOM."""
    return FamilyMapping(
        sections=(BEFORE, LAYER, AFTER),
        sizes={
            "layers": architecture.num_layers,
            "hidden": architecture.hidden_size,
            "ffn": architecture.ffn_hidden_size,
            "qkv": 3 * architecture.hidden_size,
            "vocabulary": architecture.vocab_size,
            "padded vocabulary": architecture.padded_vocab_size,
        },
        embedding="embedding.word_embeddings.weight",
        copies=("lm_head.weight",),
        architecture_class="BloomForCausalLM",
        description=f"a bloom with {architecture.num_layers} layers",
        prefix="transformer.",
    )
