"""Which tensor of a checkpoint is which tensor of a Hugging Face model: one row a parameter, both directions.

    checkpoint                                            Hugging Face BLOOM                       split over tp
    embedding.word_embeddings.weight  [vocab padded, h]   word_embeddings.weight  [vocab, h]       vocabulary rows
    decoder.layers.{i}...linear_qkv.weight  [3h, h]       h.{i}...query_key_value.weight           column rows

QKV rows are [heads, 3, head_dim] on both sides, so every row is a plain copy; only the vocabulary is padded with
zero rows. A conversion is complete, every tensor of both sides matched exactly once, or an error that names the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.architecture import BloomArchitecture

__all__ = ["FAMILIES", "FamilyMapping", "MatchedParameter", "ParameterRow", "Split", "match_names"]

Split = Literal["replicated", "column rows", "row columns", "vocabulary rows"]
"""How tensor-parallel ranks share it: all hold it whole; rows of a column-parallel weight or bias; columns of a
row-parallel weight; rows of the embedding. Checkpoints hold whole tensors; this names what a rank reads of them."""


@dataclass(frozen=True)
class ParameterRow:
    """One parameter. `{i}` stands for the layer index."""

    ours: str
    """Name in a checkpoint."""
    hf: str
    """Name in the Hugging Face model, without the prefix of its base model."""
    shape: tuple[str, ...]
    """Names of its sizes: hidden, ffn, qkv, vocabulary."""
    split: Split


@dataclass(frozen=True)
class FamilyMapping:
    """All parameters of a model family."""

    rows: tuple[ParameterRow, ...]
    prefix: str
    """What `save_pretrained` puts before the base model's names; published BLOOM checkpoints come without."""
    tied_head: str
    """Name of an output layer that is the embedding again; accepted only if bit-identical to it, never written."""
    embedding: str
    """Our name of the embedding."""
    architecture_class: str
    """What an exported config.json gives as `architectures`."""


@dataclass(frozen=True)
class MatchedParameter:
    """One tensor of a given model, with its sizes."""

    ours: str
    hf: str
    """Name as the model's files spell it, with or without the prefix."""
    shape: tuple[int, ...]
    """As Hugging Face has it."""
    padded_shape: tuple[int, ...]
    """As a checkpoint has it: differs in the rows of the vocabulary alone."""
    split: Split


def _layer(ours: str, hf: str, weight: tuple[str, str], split: Split) -> tuple[ParameterRow, ParameterRow]:
    """Make the weight's and the bias's row of a linear layer."""
    bias_split: Split = "column rows" if split == "column rows" else "replicated"
    return (
        ParameterRow(f"{ours}.weight", f"{hf}.weight", weight, split),
        ParameterRow(f"{ours}.bias", f"{hf}.bias", weight[:1], bias_split),
    )


def _norm(ours: str, hf: str) -> tuple[ParameterRow, ParameterRow]:
    """Make both rows of a LayerNorm."""
    return (
        ParameterRow(f"{ours}.weight", f"{hf}.weight", ("hidden",), "replicated"),
        ParameterRow(f"{ours}.bias", f"{hf}.bias", ("hidden",), "replicated"),
    )


_OURS, _HF = "decoder.layers.{i}", "h.{i}"

BLOOM = FamilyMapping(
    rows=(
        ParameterRow(
            "embedding.word_embeddings.weight", "word_embeddings.weight", ("vocabulary", "hidden"), "vocabulary rows"
        ),
        *_norm("embedding.layernorm", "word_embeddings_layernorm"),
        *_norm(f"{_OURS}.input_layernorm", f"{_HF}.input_layernorm"),
        *_layer(
            f"{_OURS}.self_attention.linear_qkv",
            f"{_HF}.self_attention.query_key_value",
            ("qkv", "hidden"),
            "column rows",
        ),
        *_layer(
            f"{_OURS}.self_attention.linear_proj", f"{_HF}.self_attention.dense", ("hidden", "hidden"), "row columns"
        ),
        *_norm(f"{_OURS}.pre_mlp_layernorm", f"{_HF}.post_attention_layernorm"),
        *_layer(f"{_OURS}.mlp.linear_fc1", f"{_HF}.mlp.dense_h_to_4h", ("ffn", "hidden"), "column rows"),
        *_layer(f"{_OURS}.mlp.linear_fc2", f"{_HF}.mlp.dense_4h_to_h", ("hidden", "ffn"), "row columns"),
        *_norm("decoder.final_layernorm", "ln_f"),
    ),
    prefix="transformer.",
    tied_head="lm_head.weight",
    embedding="embedding.word_embeddings.weight",
    architecture_class="BloomForCausalLM",
)

FAMILIES: dict[str, FamilyMapping] = {"bloom": BLOOM}
"""Family (Hugging Face `model_type`) -> mapping."""


def expand_rows(mapping: FamilyMapping, architecture: BloomArchitecture, *, prefix: str = "") -> list[MatchedParameter]:
    """Write the rows out for every layer of a model, in the order of the forward pass.

    Args:  prefix: put before the Hugging Face names.
    """
    sizes = {
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "qkv": 3 * architecture.hidden_size,
        "vocabulary": architecture.vocab_size,
    }
    padded = {**sizes, "vocabulary": architecture.padded_vocab_size}

    def expand(row: ParameterRow, layer: int) -> MatchedParameter:
        return MatchedParameter(
            ours=row.ours.replace("{i}", str(layer)),
            hf=prefix + row.hf.replace("{i}", str(layer)),
            shape=tuple(sizes[name] for name in row.shape),
            padded_shape=tuple(padded[name] for name in row.shape),
            split=row.split,
        )

    layered = [number for number, row in enumerate(mapping.rows) if "{i}" in row.ours]
    before, after = mapping.rows[: layered[0]], mapping.rows[layered[-1] + 1 :]
    layers = mapping.rows[layered[0] : layered[-1] + 1]
    return [
        *(expand(row, 0) for row in before),
        *(expand(row, layer) for layer in range(architecture.num_layers) for row in layers),
        *(expand(row, 0) for row in after),
    ]


def match_names(
    mapping: FamilyMapping,
    architecture: BloomArchitecture,
    *,
    names: Iterable[str],
    what: str,
    side: Literal["hf", "ours"],
) -> list[MatchedParameter]:
    """Match every tensor of a model exactly once.

    Args:    names: what the model holds; on the Hugging Face side with or without the prefix, all alike, and the
             tied head may be there. what: the model, for the message. side: whose names they are.
    Raises:  CheckpointError: names the tensors that are missing and those that belong nowhere.
    """
    found = set(names)
    prefix = mapping.prefix
    if side == "hf":
        found.discard(mapping.tied_head)
        prefix = mapping.prefix if any(name.startswith(mapping.prefix) for name in found) else ""
    parameters = expand_rows(mapping, architecture, prefix=prefix)
    wanted = {parameter.hf if side == "hf" else parameter.ours for parameter in parameters}
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise CheckpointError(
            f"{what} does not hold the tensors of a {architecture.family} with {architecture.num_layers} layers: "
            f"{_listed('missing', missing)}; {_listed('unexpected', unexpected)}. "
            "A conversion is complete or not done; check that weights and config.json belong together."
        )
    return parameters


def check_shapes(
    parameters: Iterable[MatchedParameter],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    side: Literal["hf", "ours"],
) -> None:
    """Check that every tensor has the shape that the architecture gives it.

    Raises:  CheckpointError: names the tensors with both shapes.
    """
    wrong = []
    for parameter in parameters:
        name, wanted = (parameter.hf, parameter.shape) if side == "hf" else (parameter.ours, parameter.padded_shape)
        if tuple(shapes[name]) != wanted:
            wrong.append(f"{name} is {list(shapes[name])} instead of {list(wanted)}")
    if wrong:
        raise CheckpointError(f"{what}: shapes do not agree with its config.json: {_listed('wrong', wrong)}.")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{what} ({len(names)}): {', '.join(names[:8]) or 'none'}{more}"
