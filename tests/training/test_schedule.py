"""Learning rates computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.training.schedule import learning_rate


def run(lr: float = 1.0, **schedule: Any) -> RunConfig:
    values = {
        "model": "m",
        "output": "o",
        "data": {"train": [{"prefix": "p"}]},
        "optimizer": {"lr": lr},
        "schedule": {"train_steps": 10, **schedule},
    }
    return config_from_mapping(values, RunConfig, source="test")


def rates(config: RunConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(1, config.train_steps + 1)]


def test_constant_without_warm_up_is_the_rate_from_the_first_step() -> None:
    assert rates(run(2e-5)) == [2e-5] * 10


def test_constant_with_warm_up() -> None:
    assert rates(run(lr_warmup_steps=4)) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_linear() -> None:
    config = run(lr_warmup_steps=2, lr_decay_style="linear", min_lr=0.2)
    assert rates(config) == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_cosine() -> None:
    config = run(lr_warmup_steps=2, lr_decay_style="cosine")
    found = rates(config)
    half = math.sqrt(0.5)
    assert found[:2] == [0.5, 1.0]
    assert found[3] == pytest.approx((1 + half) / 2)  # a quarter of the way: cos 45 degrees
    assert found[5] == pytest.approx(0.5)
    assert found[7] == pytest.approx((1 - half) / 2)
    assert found[9] == pytest.approx(0.0, abs=1e-12)


def test_a_run_that_is_all_warm_up() -> None:
    assert rates(run(lr_warmup_steps=10, lr_decay_style="linear")) == pytest.approx([i / 10 for i in range(1, 11)])


def test_a_rate_past_the_end_stays_at_the_floor() -> None:
    for style in ("linear", "cosine"):
        assert learning_rate(run(lr_decay_style=style, min_lr=0.1), 50) == pytest.approx(0.1)


def test_rows_count_like_steps() -> None:
    values = run(lr_decay_style="linear").model_dump(mode="json")
    values["schedule"] = {"train_rows": 80, "lr_decay_style": "linear"}
    values["batch"]["global_batch_size"] = 8
    config = config_from_mapping(values, RunConfig, source="test")
    assert rates(config) == pytest.approx(rates(run(lr_decay_style="linear")))
