"""Search, refusals and warnings: what is proposed is legal and the best of a brute count; what is wrong is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.planning.cluster import PRESETS
from megatron_xmtf.planning.hardware_plan import HardwarePlan, plan_hardware
from megatron_xmtf.planning.layout import base_layout
from megatron_xmtf.planning.layout_search import search_layouts
from megatron_xmtf.planning.memory_model import GIB, memory_by_stage
from megatron_xmtf.planning.run_model import PUBLISHED, load_plan_config
from megatron_xmtf.planning.time_model import step_time

JEAN_ZAY = PRESETS["jean-zay-a100-80"]


def config_of(name: str, *overrides: str) -> RunConfig:
    return load_plan_config(name, overrides)[0]


def plan(name: str, gpus: int, *overrides: str, cluster: str = "a100-80", **options: Any) -> HardwarePlan:
    architecture: Architecture = options.pop("architecture", PUBLISHED[name])
    return plan_hardware(config_of(name, *overrides), architecture, PRESETS[cluster], gpus=gpus, **options)


@pytest.mark.parametrize(
    ("name", "gpus", "cluster"),
    [("bloomz-176b", 288, "jean-zay-a100-80"), ("bloomz-7b1", 64, "h100"), ("mt0-xxl", 16, "h200")],
)
def test_what_is_proposed_is_legal_and_in_order(name: str, gpus: int, cluster: str) -> None:
    architecture, config = PUBLISHED[name], config_of(name)
    found = search_layouts(
        architecture, base_layout(config, gpus=gpus, loss_fraction=1.0, attention="fused"), PRESETS[cluster], keep=8
    )
    assert len(found.best) == 8 and found.tried > 30
    times = [candidate.time.seconds for candidate in found.best]
    assert times == sorted(times)
    for candidate in found.best:
        layout = candidate.layout
        architecture.check_split(layout.parallel)
        assert layout.tp * layout.pp * layout.dp == gpus and layout.tp <= 8
        assert layout.micro_batches * layout.micro_batch_size * layout.dp == config.batch.global_batch_size
        assert layout.vpp == 1 or layout.micro_batches % layout.pp == 0
        assert all(length % layout.tp == 0 for length in layout.sides)
        assert candidate.largest_gib <= 0.92 * PRESETS[cluster].memory_gib
        assert candidate.time.seconds == step_time(architecture, layout, PRESETS[cluster]).seconds
        # It can be trained as printed.
        overrides = [word for word in plan_overrides(candidate.layout)]
        assert config_of(name, *overrides).parallel == layout.parallel


def plan_overrides(layout: Any) -> list[str]:
    from megatron_xmtf.planning.hardware_plan import layout_mapping

    words: list[str] = layout_mapping(layout)["overrides"]
    given = {word.partition("=")[0] for word in words}
    # A recipe's own choices that the layout leaves at their defaults.
    back = {
        "parallel.tensor_model_parallel_size": "1",
        "parallel.pipeline_model_parallel_size": "1",
        "parallel.virtual_pipeline_model_parallel_size": "null",
        "parallel.account_for_embedding_in_pipeline_split": "false",
        "parallel.account_for_loss_in_pipeline_split": "false",
        "parallel.sequence_parallel": "false",
        "parallel.use_distributed_optimizer": "false",
    }
    return [*words, *(f"{key}={value}" for key, value in back.items() if key not in given)]


def test_the_best_is_the_best_of_a_plain_count() -> None:
    """Without pipeline, one node: every TP x micro-batch x recomputation tried by hand."""
    architecture, config = PUBLISHED["bloomz-7b1"], config_of("bloomz-7b1", "batch.global_batch_size=64")
    cluster = PRESETS["a100-80"]
    base = base_layout(config, gpus=8, loss_fraction=1.0, attention="fused")
    found = search_layouts(architecture, base, cluster, keep=1)
    best = found.best[0]
    for tp in (1, 2, 4, 8):
        parallel = type(config.parallel)(
            tensor_model_parallel_size=tp, sequence_parallel=tp > 1, use_distributed_optimizer=True
        )
        for size in (1, 2, 4, 8):
            for granularity in ("none", "full"):
                layout = replace(
                    base,
                    parallel=parallel,
                    micro_batch_size=size,
                    recompute=type(base.recompute)(granularity=granularity),
                )
                memory = max(stage.total for stage in memory_by_stage(architecture, layout, cluster))
                if memory <= 0.92 * cluster.memory_gib * GIB:
                    assert step_time(architecture, layout, cluster).seconds >= best.time.seconds


def test_small_memory_asks_for_more_splitting() -> None:
    config = config_of("bloomz-7b1")
    base = base_layout(config, gpus=64, loss_fraction=1.0, attention="fused")
    sizes = {}
    for gib in (79.0, 24.0):
        cluster = PRESETS["a100-80"].model_copy(update={"memory_gib": gib})
        best = search_layouts(PUBLISHED["bloomz-7b1"], base, cluster, keep=1).best[0]
        sizes[gib] = best.layout.tp * best.layout.pp
    assert sizes[24.0] > sizes[79.0]
    tiny = PRESETS["a100-80"].model_copy(update={"memory_gib": 11.0})
    nothing = search_layouts(PUBLISHED["bloomz-7b1"], base, tiny)
    assert not nothing.best and "comes nearest" in nothing.nearest


def test_a_model_that_no_layout_divides_is_an_error() -> None:
    base = base_layout(config_of("bloomz-560m", "batch.global_batch_size=6"), gpus=7, loss_fraction=1.0)
    with pytest.raises(ConfigError, match=r"no layout of this model uses all of 7 GPUs with a global batch of 6 rows"):
        search_layouts(PUBLISHED["bloomz-560m"], base, JEAN_ZAY)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["parallel.tensor_model_parallel_size=3"], 288, "does not divide the model's 112 attention heads"),
        (["batch.micro_batch_size=3"], 288, "global_batch_size=2048 is not a multiple of micro_batch_size x data-par"),
        ([], 290, "290 GPUs are not a multiple of tensor_model_parallel_size x pipeline_model_parallel_size = 1 x 72"),
    ],
)
def test_what_cannot_be_cut_is_an_error(overrides: list[str], gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("bloomz-176b", gpus, *overrides)


def test_a_search_replaces_a_layout_that_cannot_be_cut() -> None:
    """BLOOMZ's 72 stages on 64 GPUs: an error by itself, and the best layout where a search was asked for."""
    with pytest.raises(ConfigError, match="64 GPUs are not a multiple"):
        plan("bloomz-176b", 64, cluster="h200")
    found = plan("bloomz-176b", 64, cluster="h200", search=2)
    assert found.search is not None and found.layout == found.search.best[0].layout and found.fits
    assert "replaced" in kinds(found) and "64 GPUs are not a multiple" in found.warnings[0]["message"]


def kinds(found: HardwarePlan) -> dict[str, bool]:
    return {warning["kind"]: warning["is_refused"] for warning in found.warnings}


def test_too_little_memory_is_refused_with_the_way_out() -> None:
    found = plan("bloomz-7b1", 8, "parallel.use_distributed_optimizer=false", cluster="a100-40", attention="fused")
    assert kinds(found)["memory"] and not found.fits
    assert "use_distributed_optimizer=true" in found.warnings[0]["message"]
    assert plan("bloomz-7b1", 8, "parallel.use_distributed_optimizer=true", attention="fused").fits


def test_a_tensor_parallel_group_larger_than_a_node_is_refused() -> None:
    found = plan("bloomz-176b", 1152, "parallel.tensor_model_parallel_size=16", attention="fused")
    assert kinds(found)["tensor"] and "more than the 8 GPUs of a node" in found.warnings[0]["message"]


def test_near_the_end_of_memory_is_warned_of() -> None:
    roomy = plan("bloomz-176b", 288, attention="fused")
    largest = max(stage.total for stage in roomy.memory) / GIB
    cluster = PRESETS["a100-80"].model_copy(update={"memory_gib": largest / 0.95})
    tight = plan_hardware(config_of("bloomz-176b"), PUBLISHED["bloomz-176b"], cluster, gpus=288, attention="fused")
    assert "memory" not in kinds(roomy) and kinds(tight)["memory"] is False and tight.fits


@pytest.mark.parametrize(("heads", "word"), [(128, "no multiple of 8"), (144, "no multiple of 64"), (108, "")])
def test_head_sizes(heads: int, word: str) -> None:
    """13,824 wide: heads of 108 (which ran 27 % slower), of 96 and of 128."""
    model = BloomArchitecture(hidden_size=13_824, num_layers=70, num_attention_heads=heads, vocab_size=250_880)
    found = plan("bloomz-176b", 288, architecture=model, attention="fused")
    said = [warning["message"] for warning in found.warnings if warning["kind"] == "heads"]
    assert (len(said) == 1 and word in said[0]) if word else not said


def test_the_embeddings_weight_on_the_ends_is_warned_of() -> None:
    """BLOOM-1b7's output layer costs as much as ten of its layers: at PP2 the last stage is the slow one."""
    counted = [
        "parallel.account_for_embedding_in_pipeline_split=false",
        "parallel.account_for_loss_in_pipeline_split=false",
    ]
    uneven = plan(
        "bloomz-1b7",
        4,
        "parallel.pipeline_model_parallel_size=4",
        "parallel.tensor_model_parallel_size=1",
        *counted,
        attention="fused",
    )
    (message,) = [warning["message"] for warning in uneven.warnings if warning["kind"] == "balance"]
    assert "stage 3, which has the output layer of 250,880 words" in message and "num_layers_in_last" in message
    lighter = plan(
        "bloomz-1b7",
        4,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.tensor_model_parallel_size=2",
        "parallel.num_layers_in_last_pipeline_stage=9",
        *counted,
        attention="fused",
    )
    assert "balance" not in kinds(lighter)


def test_batches_that_do_not_fill_the_pipeline_are_warned_of() -> None:
    few = plan("bloomz-176b", 288, "batch.global_batch_size=128", attention="fused")
    assert kinds(few)["batch"] is False
    some = plan("bloomz-176b", 288, "batch.global_batch_size=512", attention="fused")
    assert "bubble" in kinds(some) and some.time.bubble_fraction > 0.15


def test_interleaving_needs_whole_groups() -> None:
    words = ["parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=6"]
    words += ["parallel.virtual_pipeline_model_parallel_size=2", "batch.global_batch_size=32"]
    found = plan("bloomz-176b", 96, *words, attention="fused")
    assert found.layout.micro_batches == 16 and kinds(found)["interleave"]
