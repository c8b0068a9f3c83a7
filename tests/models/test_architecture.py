"""Architectures from config.json in the spellings that exist, and every refusal with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.models.architecture import (
    BloomArchitecture,
    architecture_from_hf,
    architecture_from_mapping,
)

# bigscience/bloom-560m as published: older names, and keys that say nothing about the shape
BLOOM_560M: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_head": 16,
    "n_inner": None,
    "n_layer": 24,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}


def test_a_published_config() -> None:
    found = architecture_from_hf(BLOOM_560M)
    assert found == BloomArchitecture(hidden_size=1024, num_layers=24, num_attention_heads=16, vocab_size=250880)
    assert (found.head_dim, found.ffn_hidden_size, found.padded_vocab_size) == (64, 4096, 250880)


def test_other_spellings_say_the_same() -> None:
    renamed = {"n_embed": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = {key: value for key, value in BLOOM_560M.items() if key not in ("hidden_size", "n_layer", "n_head")}
    assert architecture_from_hf({**config, **renamed}) == architecture_from_hf(BLOOM_560M)


def test_what_transformers_writes() -> None:
    config = BloomConfig(
        vocab_size=300, hidden_size=64, n_layer=4, n_head=4, hidden_dropout=0.1, layer_norm_epsilon=1e-6
    )
    found = architecture_from_hf(config.to_dict())
    assert (found.vocab_size, found.hidden_size, found.num_layers, found.num_attention_heads) == (300, 64, 4, 4)
    assert (found.hidden_dropout, found.attention_dropout, found.layernorm_epsilon) == (0.1, 0.0, 1e-6)
    assert found.padded_vocab_size == 384


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (250_680, 250_752), (250_880, 250_880)]
)
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size: int, padded: int) -> None:
    architecture = BloomArchitecture(hidden_size=8, num_layers=1, num_attention_heads=1, vocab_size=vocab_size)
    assert architecture.padded_vocab_size == padded


def test_a_residual_after_the_norm_is_refused() -> None:
    with pytest.raises(CheckpointError, match="apply_residual_connection_post_layernorm"):
        architecture_from_hf({**BLOOM_560M, "apply_residual_connection_post_layernorm": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blooom"}, "model_type 'blooom' has no family here; nearest: bloom"),
        ({"model_type": "llama"}, "model_type 'llama' has no family here; known: blenderbot, bloom, mt5, t5"),
        ({"model_type": None}, "model_type None has no family here"),
        ({"hidden_size": 0}, "no positive integer hidden_size or n_embed"),
        ({"hidden_size": None}, "no positive integer hidden_size or n_embed"),
        ({"n_layer": "24"}, "no positive integer n_layer or num_hidden_layers"),
        ({"n_head": True}, "no positive integer n_head or num_attention_heads"),
        ({"vocab_size": -1}, "no positive integer vocab_size"),
        ({"n_head": 15}, "hidden_size=1024 is not a multiple of n_head=15"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0 must be a number from 0 to below 1"),
        ({"attention_dropout": "0.1"}, "attention_dropout='0.1' must be a number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan must be a number"),
    ],
)
def test_an_impossible_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_from_hf({**BLOOM_560M, **change})
    assert message in str(caught.value)


def test_a_manifest_keeps_an_architecture() -> None:
    architecture = architecture_from_hf({**BLOOM_560M, "hidden_dropout": 0.1})
    assert architecture_from_mapping(architecture.to_mapping()) == architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "gpt"}, "model family 'gpt' is not known; known: bloom, mt5, t5, alexatm"),
        ({"rotary_base": 1e4}, "does not fit.*rotary_base"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(change: dict[str, Any], message: str) -> None:
    values = {**architecture_from_hf(BLOOM_560M).to_mapping(), **change}
    with pytest.raises(CheckpointError, match=message):
        architecture_from_mapping(values)


def test_a_manifest_with_a_size_missing_is_refused() -> None:
    values = architecture_from_hf(BLOOM_560M).to_mapping()
    del values["num_layers"]
    with pytest.raises(CheckpointError, match="num_layers"):
        architecture_from_mapping(values)


def split(**sizes: int) -> None:
    # bloom-176b: 112 heads, 70 layers
    architecture = BloomArchitecture(hidden_size=14336, num_layers=70, num_attention_heads=112, vocab_size=250880)
    architecture.check_split(ParallelConfig(**sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 14},
        {"tensor_model_parallel_size": 112},
        {"pipeline_model_parallel_size": 7, "virtual_pipeline_model_parallel_size": 5},
    ],
)
def test_a_split_that_fits(sizes: dict[str, int]) -> None:
    split(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            r"=3 does not divide the model's 112 attention heads; use one of \[1, 2, 4,",
        ),
        ({"pipeline_model_parallel_size": 12}, r"= 12 does not divide the model's 70 layers; use one of \[1, 2, 5, 7,"),
        ({"pipeline_model_parallel_size": 7, "virtual_pipeline_model_parallel_size": 3}, "= 21 does not divide"),
    ],
)
def test_a_split_that_does_not_fit_names_those_that_do(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(**sizes)


def test_vocabulary_rows_must_divide_too() -> None:
    architecture = BloomArchitecture(hidden_size=60, num_layers=2, num_attention_heads=10, vocab_size=300)
    with pytest.raises(ConfigError, match="=5 does not divide the model's 384 vocabulary rows"):
        architecture.check_split(ParallelConfig(tensor_model_parallel_size=5))


COUNTED = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


@pytest.mark.parametrize(
    ("layers", "sizes", "split"),
    [
        (4, {}, [[4]]),
        (8, {PP: 2, VPP: 2}, [[2, 2], [2, 2]]),
        (70, {PP: 72, **COUNTED}, [[0], *[[1]] * 70, [0]]),
        (70, {PP: 12, **COUNTED}, [[5], *[[6]] * 10, [5]]),
        (4, {PP: 2, VPP: 3, **COUNTED}, [[0, 1, 1], [1, 1, 0]]),
        (7, {PP: 4, "account_for_loss_in_pipeline_split": True}, [[2], [2], [2], [1]]),
        (7, {PP: 2, "account_for_embedding_in_pipeline_split": True}, [[3], [4]]),
        (4, {PP: 2, FIRST: 1, LAST: 3}, [[1], [3]]),
        (7, {PP: 3, FIRST: 1}, [[1], [3], [3]]),
        (10, {PP: 4, FIRST: 2, LAST: 2, VPP: 1}, [[2], [3], [3], [2]]),
        (12, {PP: 4, LAST: 6, VPP: 2}, [[1, 1], [1, 1], [1, 1], [3, 3]]),
    ],
)
def test_layers_are_dealt_as_megatron_core_deals_them(
    layers: int, sizes: dict[str, Any], split: list[list[int]]
) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from megatron_xmtf.models.registry import transformer_config

    architecture = BloomArchitecture(hidden_size=64, num_layers=layers, num_attention_heads=4, vocab_size=300)
    parallel = ParallelConfig(**sizes)
    assert architecture.chunk_layers(parallel) == split
    config = transformer_config(architecture, parallel=parallel, precision="fp32")
    for stage, chunks in enumerate(split):
        for chunk, count in enumerate(chunks):
            vp_stage = None if parallel.virtual_pipeline_model_parallel_size is None else chunk
            assert get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage) == count


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {PP: 70, **COUNTED},
            r"= 70 does not divide the model's 70 layers \+ 2 for embedding and loss = 72; use one of",
        ),
        ({PP: 72}, "= 72 does not divide the model's 70 layers; use one of"),
        ({PP: 2, FIRST: 30, LAST: 30}, "leave 10 of the model's 70 layers to 0 stages"),
        ({PP: 4, FIRST: 35, LAST: 35}, "leave 0 of the model's 70 layers to 2 stages"),
        ({PP: 3, FIRST: 71}, "leave -1 of the model's 70 layers to 2 stages"),
        ({PP: 4, FIRST: 9}, "leave 61 of the model's 70 layers to 3 stages, which must share them evenly"),
        ({PP: 2, FIRST: 35, VPP: 2}, "stages of 35 layers cannot be cut into virtual_pipeline_model_parallel_size=2"),
    ],
)
def test_an_uneven_split_that_does_not_come_out_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (COUNTED, "needs pipeline_model_parallel_size > 1; it is 1"),
        ({PP: 4, FIRST: 1, **COUNTED}, "cannot be combined"),
    ],
)
def test_keys_of_uneven_splits_that_contradict_each_other_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**sizes)


def test_parameters_are_counted_as_published() -> None:
    # The model card of bigscience/bloom: "176,247,271,424 parameters".
    bloom = BloomArchitecture(hidden_size=14336, num_layers=70, num_attention_heads=112, vocab_size=250880)
    assert bloom.parameter_count == 176_247_271_424
    # bigscience/bloom-560m: 559,214,592.
    assert architecture_from_hf(BLOOM_560M).parameter_count == 559_214_592
