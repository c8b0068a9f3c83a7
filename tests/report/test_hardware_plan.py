"""Pictures and tables of a hardware plan: what is drawn is what was planned."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from megatron_xmtf.planning.cluster import PRESETS
from megatron_xmtf.planning.hardware_plan import HardwarePlan, plan_hardware
from megatron_xmtf.planning.memory_model import GIB
from megatron_xmtf.planning.run_model import PUBLISHED, load_plan_config
from megatron_xmtf.report.hardware_plan import add_hardware_plan
from megatron_xmtf.report.hardware_table import shown_stages, word_hardware_plan
from megatron_xmtf.report.memory_picture import memory_picture
from megatron_xmtf.report.page import Page
from megatron_xmtf.report.schedule_picture import schedule_picture, shown_micro_batches

WORDS = ["parallel.pipeline_model_parallel_size=4", "parallel.account_for_embedding_in_pipeline_split=false"]
WORDS += ["parallel.account_for_loss_in_pipeline_split=false", "batch.global_batch_size=64"]


def plan(*overrides: str, gpus: int = 8, search: int = 3) -> HardwarePlan:
    config, _ = load_plan_config("bloomz-1b1", [*WORDS, *overrides])
    return plan_hardware(config, PUBLISHED["bloomz-1b1"], PRESETS["a100-40"], gpus=gpus, search=search)


def rectangles(picture: str) -> list[tuple[dict[str, str], str]]:
    """Return attributes and hovering words of every rectangle of a picture, which must be well-formed."""
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(picture)
    return [(one.attrib, (one.findtext(f"{space}title") or "")) for one in root.iter(f"{space}rect")]


def test_memory_bars_are_as_long_as_what_they_show() -> None:
    found = plan()
    drawn = rectangles(memory_picture(found.memory, limit_gib=39.4))
    bars = [
        (float(box["width"]), re.fullmatch(r"stage (\d+), (\w+): ([\d.]+) GiB", words)) for box, words in drawn if words
    ]
    scales = [width / float(match[3]) for width, match in bars if match and float(match[3]) > 0.5]
    assert len(bars) == sum(bool(getattr(stage, kind)) for stage in found.memory for kind in KINDS_HELD)
    assert max(scales) == pytest.approx(min(scales), rel=0.02)
    for _, match in bars:
        assert match is not None
        held = getattr(found.memory[int(match[1])], match[2]) / GIB
        assert float(match[3]) == pytest.approx(held, abs=0.005)


KINDS_HELD = ("weights", "gradients", "optimizer", "activations", "logits", "framework")


@pytest.mark.parametrize("virtual", [[], ["parallel.virtual_pipeline_model_parallel_size=2"]])
def test_the_schedule_shows_each_pass_once_in_time(virtual: list[str]) -> None:
    found = plan(*virtual, search=0)
    picture = schedule_picture(found.time.chunks, micro_batches=8, hand_over=0.0)
    passes = [
        (float(box["x"]), float(box["width"]), float(box["y"]), words) for box, words in rectangles(picture) if words
    ]
    assert len(passes) == 4 * 8 * 2 * (2 if virtual else 1)
    for y in {place[2] for place in passes}:
        row = sorted(place for place in passes if place[2] == y)
        assert all(first[0] + first[1] <= second[0] + 0.2 for first, second in zip(row, row[1:], strict=False))
    first = min(passes)
    assert first[3].startswith("micro-batch 0") and "forward" in first[3]


def test_deep_pipelines_stay_small() -> None:
    config, _ = load_plan_config("bloomz-176b", [])
    found = plan_hardware(config, PUBLISHED["bloomz-176b"], PRESETS["h200"], gpus=288)
    assert shown_micro_batches(512, 72, 1) == 96
    picture = schedule_picture(found.time.chunks, micro_batches=96, hand_over=0.0)
    assert len(picture) < 600_000 and "stage 71</text>" in picture
    stages = [stage.stage for stage in shown_stages(found.memory)]
    assert stages[0] == 0 and stages[-1] == 71 and len(stages) <= 6


def test_the_page_and_the_table_say_the_same() -> None:
    found = plan()
    page = add_hardware_plan(Page("Hardware plan"), found).html()
    text = word_hardware_plan(found)
    assert f"<b>{found.cost.mfu_percent:.1f} %</b>" in page and f"MFU {found.cost.mfu_percent:.1f} %" in text
    assert f"<b>{found.time.seconds:,.2f} s</b>" in page and f"{found.time.seconds:,.2f} s; " in text
    assert page.count("<svg") == 2 and "The pipeline" in page
    assert found.search is not None
    for candidate in found.search.best:
        assert candidate.layout.words in page and candidate.layout.words in text
    for warning in found.warnings:
        assert warning["message"] in text
    assert "1F1B" in page and "a loss at every position, an upper bound" in text
