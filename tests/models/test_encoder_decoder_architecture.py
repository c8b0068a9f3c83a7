"""mT5 and T5 config.json in the spellings that exist, and every refusal with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.architecture import (
    EncoderDecoderArchitecture,
    architecture_from_hf,
    architecture_from_mapping,
)

# google/mt5-small as published
MT5_SMALL: dict[str, Any] = {
    "architectures": ["MT5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "mt5",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "use_cache": True,
    "vocab_size": 250112,
}


def read(config: dict[str, Any], *, head_differs: bool | None = None) -> EncoderDecoderArchitecture:
    found = architecture_from_hf(config, head_differs=head_differs)
    assert isinstance(found, EncoderDecoderArchitecture)
    return found


def test_a_published_mt5() -> None:
    found = read(MT5_SMALL)
    assert found == EncoderDecoderArchitecture(
        hidden_size=512,
        num_encoder_layers=8,
        num_decoder_layers=8,
        num_attention_heads=6,
        head_dim=64,
        ffn_hidden_size=1024,
        vocab_size=250112,
        dropout=0.1,
        family="mt5",
    )
    assert (found.attention_size, found.num_layers, found.padded_vocab_size, found.head_scale) == (384, 16, 250112, 1)
    assert found.gated and not found.tied_head and not found.attention_scaling


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (MT5Config(**MT5_SMALL), MT5ForConditionalGeneration),
        (T5Config(decoder_start_token_id=0), T5ForConditionalGeneration),
        (
            T5Config(
                decoder_start_token_id=0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                num_decoder_layers=2,
                d_kv=24,
                dropout_rate=0.0,
            ),
            T5ForConditionalGeneration,
        ),
    ],
    ids=["mt5", "t5-1.0", "t5-1.1"],
)
@pytest.mark.parametrize("untied", [False, True])
def test_what_transformers_writes_and_counts(config: Any, model: Any, untied: bool) -> None:
    written = config.to_dict()
    assert written["tie_word_embeddings"] is True, "transformers 5 says so of every T5"
    found = read(written, head_differs=untied)
    assert (found.num_encoder_layers, found.num_decoder_layers) == (config.num_layers, config.num_decoder_layers)
    assert (found.head_dim, found.dropout, found.ffn_hidden_size) == (config.d_kv, config.dropout_rate, config.d_ff)
    assert found.gated == config.is_gated_act and found.tied_head != untied
    assert found.scaled_head == getattr(config, "scale_decoder_outputs", False)
    with torch.device("meta"):
        built = model(config)
        if untied:
            built.lm_head.weight = torch.nn.Parameter(torch.empty_like(built.lm_head.weight))
    assert found.parameter_count == built.num_parameters()


def test_the_published_flag_of_t5_says_scaled_and_tied_at_once() -> None:
    published = {**MT5_SMALL, "model_type": "t5"}
    assert (read(published).tied_head, read(published).scaled_head) == (False, False)
    old = {key: value for key, value in published.items() if key != "tie_word_embeddings"}
    assert (read(old).tied_head, read(old).scaled_head) == (True, True)
    assert read(old).head_scale == pytest.approx(512**-0.5)
    # The files overrule the flag where the head is concerned, not where it scales.
    assert (read(old, head_differs=True).tied_head, read(old, head_differs=True).scaled_head) == (False, True)
    assert read({**MT5_SMALL, "tie_word_embeddings": True}).scaled_head is False


def test_defaults_are_those_of_transformers() -> None:
    absent = ("feed_forward_proj", "num_decoder_layers", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    assert read({key: value for key, value in MT5_SMALL.items() if key not in absent}) == read(MT5_SMALL)
    t5 = {**MT5_SMALL, "model_type": "t5"}
    assert read({k: v for k, v in t5.items() if k != "feed_forward_proj"}).feed_forward == T5Config().feed_forward_proj
    spelled = {"num_hidden_layers": 8, "hidden_size": 512, "head_dim": 64, "num_attention_heads": 6}
    renamed = {k: v for k, v in MT5_SMALL.items() if k not in ("num_layers", "d_model", "d_kv", "num_heads")}
    assert read({**renamed, **spelled}) == read(MT5_SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"feed_forward_proj": "gated-silu"},
            "='gated-silu' is not offered; offered: gated-gelu, relu",
        ),
        ({"feed_forward_proj": ["relu"]}, "is not offered"),
        ({"dense_act_fn": "relu"}, "dense_act_fn='relu' contradicts feed_forward_proj='gated-gelu'"),
        ({"is_gated_act": False}, "is_gated_act=False contradicts"),
        ({"d_kv": 0}, "no positive integer d_kv or head_dim"),
        ({"num_decoder_layers": 0}, "no positive integer num_decoder_layers"),
        ({"dropout_rate": 1}, "dropout_rate=1 must be a number from 0 to below 1"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings=0 must be true or false"),
        ({"scale_decoder_outputs": "no", "model_type": "t5"}, "scale_decoder_outputs='no' must be true or false"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] must be one token id"),
        ({"pad_token_id": 250112}, "pad_token_id=250112 must be one token id, from 0 to below vocab_size=250112"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id=None must be one token id"),
        ({"relative_attention_max_distance": 16}, "half of it less than relative_attention_max_distance=16"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False: only whole encoder-decoders are converted"),
        ({"is_decoder": True}, "is_decoder=True"),
    ],
)
def test_an_impossible_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**MT5_SMALL, **change})


def test_a_t5_without_a_decoder_start_is_refused() -> None:
    config = {key: value for key, value in MT5_SMALL.items() if key != "decoder_start_token_id"}
    assert read(config).decoder_start_token_id == 0
    with pytest.raises(CheckpointError, match="decoder_start_token_id=None"):
        read({**config, "model_type": "t5"})


def test_a_manifest_keeps_an_architecture() -> None:
    architecture = read(MT5_SMALL)
    assert architecture_from_mapping(architecture.to_mapping()) == architecture
    with pytest.raises(CheckpointError, match="does not fit.*rotary_base"):
        architecture_from_mapping({**architecture.to_mapping(), "rotary_base": 1e4})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_model_parallel_size": 4}, "=4 does not divide the model's 6 attention heads"),
        ({"pipeline_model_parallel_size": 17}, r"= 17 is more than the model's 8 \+ 8 = 16 layers"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(sizes: dict[str, int], message: str) -> None:
    architecture = read(MT5_SMALL)
    architecture.check_split(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=16))
    with pytest.raises(ConfigError, match=message):
        architecture.check_split(ParallelConfig(**sizes))


def test_alexatm_is_counted_as_published() -> None:
    """Soltan et al. 2022: 46 + 32 layers, 4096 wide, 32 heads, 150k words: "19.75 billion parameters"."""
    alexatm = EncoderDecoderArchitecture(
        hidden_size=4096,
        num_encoder_layers=46,
        num_decoder_layers=32,
        num_attention_heads=32,
        head_dim=128,
        ffn_hidden_size=4 * 4096,
        vocab_size=150_000,
        feed_forward="gelu",
        norm="layernorm",
        positions="learned",
        linear_bias=True,
        attention_scaling=True,
        max_positions=1024,
        tied_embeddings=False,
        tied_head=False,
        family="alexatm",
    )
    # "150k" and the published figure are rounded; a head tied to the decoder's table would give 19.09.
    assert alexatm.parameter_count / 1e9 == pytest.approx(19.75, abs=0.05)
