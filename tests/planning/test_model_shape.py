"""Parameters and state of each rank, counted, against the dry run, which builds the model on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.presets import PRESETS
from megatron_xmtf.planning.cluster import PRESETS as CLUSTERS
from megatron_xmtf.planning.layout import layout_of
from megatron_xmtf.planning.memory_model import memory_by_stage
from megatron_xmtf.planning.run_model import PUBLISHED
from megatron_xmtf.training.dry_run import size_stages
from tests.layouts import COUNTED, PP, TP

BLOOM_176B = PUBLISHED["bloomz-176b"]
TINY_BLOOM = BloomArchitecture(hidden_size=64, num_layers=6, num_attention_heads=4, vocab_size=300)
MT5 = PUBLISHED["mt0-small"]
ALEXATM = PRESETS["alexatm-toy"]
ZERO = {"use_distributed_optimizer": True}
VPP = "virtual_pipeline_model_parallel_size"

CASES: list[tuple[str, Architecture, int, dict[str, Any], dict[str, Any]]] = [
    ("176B TP4 PP12", BLOOM_176B, 384, {TP: 4, PP: 12, **COUNTED, **ZERO, "sequence_parallel": True}, {}),
    ("176B TP1 PP72", BLOOM_176B, 288, {PP: 72, **COUNTED, **ZERO}, {}),
    ("whole, fp32", TINY_BLOOM, 1, {}, {"precision": "fp32"}),
    ("interleaved, fp16", TINY_BLOOM, 4, {PP: 2, VPP: 3}, {"precision": "fp16"}),
    ("mT5 TP2 PP4", MT5, 16, {TP: 2, PP: 4, **ZERO}, {}),
    ("mT5 interleaved, Adafactor", MT5, 4, {PP: 2, VPP: 2}, {"optimizer": {"name": "adafactor"}}),
    ("AlexaTM", ALEXATM, 4, {TP: 2, PP: 2, "pipeline_layers": [3, 2]}, {}),
]


def config_of(architecture: Architecture, section: dict[str, Any], others: dict[str, Any]) -> RunConfig:
    sides = {} if isinstance(architecture, BloomArchitecture) else {"encoder_length": 64, "decoder_length": 32}
    values = {
        "model": "none",
        "output": "none",
        "data": {"train": [{"prefix": "none"}]},
        "batch": {"global_batch_size": 384, **sides},
        "schedule": {"train_steps": 1},
        "parallel": section,
        **others,
    }
    return config_from_mapping(values, RunConfig, source="test")


@pytest.mark.parametrize(("name", "architecture", "ranks", "section", "others"), CASES, ids=[case[0] for case in CASES])
def test_ranks_hold_what_the_dry_run_builds(
    name: str, architecture: Architecture, ranks: int, section: dict[str, Any], others: dict[str, Any]
) -> None:
    config = config_of(architecture, section, others)
    built, total = size_stages(architecture, config, world_size=ranks)
    assert total == architecture.parameter_count
    planned = memory_by_stage(architecture, layout_of(config, gpus=ranks, loss_fraction=1.0), CLUSTERS["h100"])
    wanted = [
        (size.parameters, size.layers, size.weight_bytes, size.gradient_bytes, size.optimizer_bytes)
        for size in built
        for _ in range(size.count)
    ]
    found = [(one.parameters, one.layers, one.weights, one.gradients, one.optimizer) for one in planned]
    assert [values[:4] for values in found] == [values[:4] for values in wanted]
    # The dry run rounds shares of the optimizer's state up to whole numbers of four bytes.
    assert all(0 <= ours[4] - theirs[4] < 4 for ours, theirs in zip(wanted, found, strict=True))


def test_bloom_176b_at_its_published_layout() -> None:
    """By hand: layers of (12 h^2 + 7 h) / 4 + 6 h, 250,880 / 4 words, and norms."""
    hidden = 14_336
    layer = (12 * hidden**2 + 7 * hidden) // 4 + 6 * hidden
    words = 250_880 // 4 * hidden
    config = config_of(BLOOM_176B, {TP: 4, PP: 12, **COUNTED}, {})
    found = [
        stage.parameters
        for stage in memory_by_stage(
            BLOOM_176B, layout_of(config, gpus=384, loss_fraction=1.0), CLUSTERS["jean-zay-a100-80"]
        )
    ]
    assert found == [5 * layer + words + 2 * hidden, *[6 * layer] * 10, 5 * layer + words + 2 * hidden]
    assert BLOOM_176B.parameter_count == 176_247_271_424


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As `num_parameters()` of `transformers` counts them, and as the model cards round them.
        ("bloomz-560m", 559_214_592),
        ("bloomz-1b1", 1_065_314_304),
        ("bloomz-1b7", 1_722_408_960),
        ("bloomz-3b", 3_002_557_440),
        ("bloomz-7b1", 7_069_016_064),
        ("bloomz-176b", 176_247_271_424),
        ("mt0-small", 300_176_768),
        ("mt0-base", 582_401_280),
        ("mt0-large", 1_229_581_312),
        ("mt0-xl", 3_742_619_648),
        ("mt0-xxl", 12_921_057_280),
        ("flan-t5-small", 76_961_152),
        ("flan-t5-base", 247_577_856),
        ("flan-t5-large", 783_150_080),
        ("flan-t5-xl", 2_849_757_184),
        ("flan-t5-xxl", 11_135_332_352),
    ],
)
def test_recipes_are_about_the_published_models(name: str, parameters: int) -> None:
    assert PUBLISHED[name].parameter_count == parameters
