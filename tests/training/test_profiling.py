"""Traces hold the steps of their window and no others."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.config.schema import ProfileConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.training.profiling import StepProfiler


def trace(
    directory: Path, config: ProfileConfig | None, *, rank: int = 0, resumed_step: int = 0, steps: int = 6
) -> None:
    profiler = StepProfiler(config, directory=directory, rank=rank, resumed_step=resumed_step)
    for step in range(resumed_step + 1, 7):
        with profiler.step(step):
            torch.ones(8, 8) @ torch.ones(8, 8)


def traced_steps(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(name for name in names if name.startswith("step "))


def test_the_window_is_traced_and_nothing_else(tmp_path: Path) -> None:
    trace(tmp_path / "profile", ProfileConfig(start=3, steps=2))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_3-4_rank_0.json"
    assert traced_steps(path) == ["step 3", "step 4"]


def test_other_ranks_are_traced_when_asked_for(tmp_path: Path) -> None:
    trace(tmp_path, ProfileConfig(start=1, steps=1), rank=1)
    assert not list(tmp_path.iterdir())
    trace(tmp_path, ProfileConfig(start=1, steps=1, ranks="all"), rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["steps_1-1_rank_1.json"]


def test_a_resumed_run_traces_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace(tmp_path, ProfileConfig(start=2, steps=3), resumed_step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["steps_4-4_rank_0.json"]
    with caplog.at_level(logging.WARNING):
        trace(tmp_path / "none", ProfileConfig(start=2, steps=3), resumed_step=4)
    assert "steps up to 4 are done already" in caplog.text
    assert not (tmp_path / "none").exists()


def test_no_window_no_trace(tmp_path: Path) -> None:
    trace(tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_window_behind_the_end_is_refused() -> None:
    values = {
        **{"model": "m", "output": "o", "data": {"train": [{"prefix": "p"}]}, "schedule": {"train_steps": 10}},
        "logging": {"profile": {"start": 9, "steps": 3}},
    }
    with pytest.raises(ConfigError, match="steps 9 to 11, the run has 10"):
        config_from_mapping(values, RunConfig, source="test")
