"""AlexaTM's architecture as the config.json of a Blenderbot whose tables of words are three, and back.

`BlenderbotForConditionalGeneration` computes what AlexaTM does: norms before every sublayer and behind each side, no
norm behind the embeddings, learned positions counted from 0, biases everywhere, scores divided by sqrt(head_dim). With
`tie_word_embeddings: false` its two tables and its head are three parameters, in memory and in its files; a fourth,
`model.shared.weight`, is then read by nothing.

The neighbours differ: MBart has a norm behind the embeddings and positions counted from 2, BART and PLBart have norms
behind their sublayers as well.

Source:  Soltan et al. 2022, section 2 (AlexaTM 20B); `transformers` 5.23 modeling_blenderbot.py, _mbart.py, _bart.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.config_fields import read_fraction, read_size, read_token_id
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["alexatm_from_hf", "alexatm_to_hf", "check_has_hf_form"]

REQUIRED = {
    # name: (the one value that is read, what `transformers` takes where config.json does not say)
    "activation_function": ("gelu_new", "gelu"),
    "scale_embedding": (False, False),
    "tie_word_embeddings": (False, True),
    "encoder_layerdrop": (0.0, 0.0),
    "decoder_layerdrop": (0.0, 0.0),
    "is_encoder_decoder": (True, True),
    "is_decoder": (False, False),
}
LAYERNORM_EPSILON = 1e-5
"""torch's default, which Blenderbot's norms have; no key of its config.json changes it."""
SAME = (
    ("encoder_attention_heads", "decoder_attention_heads"),
    ("encoder_ffn_dim", "decoder_ffn_dim"),
    ("dropout", "attention_dropout"),
    ("dropout", "activation_dropout"),
)
"""Two of Blenderbot's keys, one of ours."""


def alexatm_from_hf(config: Mapping[str, Any]) -> EncoderDecoderArchitecture:
    """Read an AlexaTM from the contents of a Blenderbot's config.json.

    Raises:  CheckpointError: a Blenderbot that is none: another activation, scaled or tied embeddings, sides of
             different width; a missing or impossible field.
    """
    for name, (wanted, default) in REQUIRED.items():
        if config.get(name, default) != wanted:
            raise CheckpointError(
                f"config.json: {name}={config.get(name, default)!r}: a blenderbot is read where it is an AlexaTM, "
                f"which has {name}={wanted!r}."
            )
    values = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0, **config}
    for first, second in SAME:
        if values.get(first) != values.get(second):
            raise CheckpointError(
                f"config.json: {first}={values.get(first)!r} and {second}={values.get(second)!r} must be equal: here "
                "they are one number."
            )
    hidden, heads = read_size(config, "d_model"), read_size(config, "encoder_attention_heads")
    if hidden % heads:
        raise CheckpointError(f"config.json: d_model={hidden} is not a multiple of encoder_attention_heads={heads}.")
    vocab_size = read_size(config, "vocab_size")
    ids: dict[str, Any] = {
        name: read_token_id(config, name, default=default, vocab_size=vocab_size)
        for name, default in (("pad_token_id", 0), ("eos_token_id", 2), ("decoder_start_token_id", 1))
    }
    return EncoderDecoderArchitecture(
        hidden_size=hidden,
        num_encoder_layers=read_size(config, "encoder_layers"),
        num_decoder_layers=read_size(config, "decoder_layers"),
        num_attention_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=read_size(config, "encoder_ffn_dim"),
        vocab_size=vocab_size,
        max_positions=read_size({"max_position_embeddings": 128, **config}, "max_position_embeddings"),
        dropout=read_fraction(config, "dropout", default=0.1),
        **ALEXATM,
        **ids,
    )


ALEXATM: dict[str, Any] = {
    "family": "alexatm",
    "feed_forward": "gelu",
    "norm": "layernorm",
    "layernorm_epsilon": LAYERNORM_EPSILON,
    "positions": "learned",
    "linear_bias": True,
    "attention_scaling": True,
    "tied_embeddings": False,
    "tied_head": False,
    "scaled_head": False,
}
"""What an AlexaTM is whatever its size."""


def check_has_hf_form(architecture: EncoderDecoderArchitecture) -> None:
    """Check that Blenderbot computes the same, three tables and all.

    Raises:  CheckpointError: names every option in which the two differ.
    """
    differing = [
        f"{name} is {getattr(architecture, name)!r}, not {wanted!r}"
        for name, wanted in ALEXATM.items()
        if getattr(architecture, name) != wanted
    ]
    if architecture.attention_size != architecture.hidden_size:
        differing.append(f"heads x head_dim is {architecture.attention_size}, not hidden_size")
    if differing:
        raise CheckpointError(
            "this AlexaTM has no Hugging Face form: the closest class of `transformers`, "
            f"BlenderbotForConditionalGeneration with tie_word_embeddings=false, differs: {'; '.join(differing)}."
        )


def alexatm_to_hf(architecture: EncoderDecoderArchitecture) -> dict[str, Any]:
    """Return the contents of the config.json that `alexatm_from_hf` reads, without `dtype`.

    Raises:  CheckpointError: `check_has_hf_form`.
    """
    check_has_hf_form(architecture)
    return {
        **{name: wanted for name, (wanted, _) in REQUIRED.items()},
        "architectures": ["BlenderbotForConditionalGeneration"],
        "model_type": "blenderbot",
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_positions,
        "d_model": architecture.hidden_size,
        "encoder_layers": architecture.num_encoder_layers,
        "decoder_layers": architecture.num_decoder_layers,
        "encoder_attention_heads": architecture.num_attention_heads,
        "decoder_attention_heads": architecture.num_attention_heads,
        "encoder_ffn_dim": architecture.ffn_hidden_size,
        "decoder_ffn_dim": architecture.ffn_hidden_size,
        "dropout": architecture.dropout,
        "attention_dropout": architecture.dropout,
        "activation_dropout": architecture.dropout,
        "pad_token_id": architecture.pad_token_id,
        "bos_token_id": architecture.decoder_start_token_id,
        "eos_token_id": architecture.eos_token_id,
        "decoder_start_token_id": architecture.decoder_start_token_id,
        # Blenderbot's own answers end in a forced EOS and repeat no three words of the question.
        "forced_eos_token_id": None,
        "encoder_no_repeat_ngram_size": 0,
    }
