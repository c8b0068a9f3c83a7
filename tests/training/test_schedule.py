"""Learning rates computed by hand, and those of `transformers` where it has the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.training.schedule import learning_rate


def run(lr: float = 1.0, *, batch: int = 2048, **schedule: Any) -> RunConfig:
    length = {} if "train_rows" in schedule else {"train_steps": 10}
    values = {
        "model": "m",
        "output": "o",
        "data": {"train": [{"prefix": "p"}]},
        "batch": {"global_batch_size": batch},
        "optimizer": {"lr": lr},
        "schedule": {**length, **schedule},
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


def test_inverse_square_root() -> None:
    config = run(train_steps=16, lr_warmup_steps=4, lr_decay_style="inverse_square_root")
    found = rates(config)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[8] == pytest.approx(2 / 3)  # step 9: sqrt(4 / 9)
    assert found[15] == pytest.approx(0.5)  # step 16: sqrt(4 / 16)
    assert learning_rate(config, 400) == pytest.approx(0.1)
    floored = run(train_steps=16, lr_warmup_steps=4, lr_decay_style="inverse_square_root", min_lr=0.6)
    assert rates(floored)[8:] == pytest.approx([2 / 3, math.sqrt(0.4), math.sqrt(4 / 11), *[0.6] * 5])


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        # a quarter, a half, three quarters, all of the way from 1 to 0.2
        ("linear", [0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]),
        ("minus_sqrt", [0.6, 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2]),
        ("exponential", [0.2 + 0.8 * (2 * 0.5**q - 1) for q in (0.25, 0.5, 0.75, 1)]),
    ],
)
def test_wsd(shape: str, decay: list[float]) -> None:
    config = run(lr_decay_style="wsd", lr_warmup_steps=2, lr_wsd_decay_steps=4, lr_wsd_decay_style=shape, min_lr=0.2)
    assert rates(config) == pytest.approx([0.5, 1, 1, 1, 1, 1, *decay])


@pytest.mark.parametrize("length", [{"lr_wsd_decay_rows": 32}, {"lr_wsd_decay_fraction": 0.4}])
def test_the_decay_of_wsd_in_rows_and_as_a_share(length: dict[str, Any]) -> None:
    wanted = rates(run(batch=8, lr_decay_style="wsd", lr_wsd_decay_steps=4))
    assert rates(run(batch=8, lr_decay_style="wsd", **length)) == pytest.approx(wanted)


def test_a_run_that_is_all_warm_up() -> None:
    assert rates(run(lr_warmup_steps=10, lr_decay_style="linear")) == pytest.approx([i / 10 for i in range(1, 11)])


@pytest.mark.parametrize("more", [{}, {"lr_wsd_decay_fraction": 0.5}])
def test_a_rate_past_the_end_stays_at_the_floor(more: dict[str, Any]) -> None:
    for style in ("wsd",) if more else ("linear", "cosine"):
        assert learning_rate(run(lr_decay_style=style, min_lr=0.1, **more), 50) == pytest.approx(0.1)


def test_rows_count_like_steps() -> None:
    wanted = rates(run(lr_decay_style="linear"))
    assert rates(run(train_rows=80, batch=8, lr_decay_style="linear")) == pytest.approx(wanted)


def test_warm_up_in_rows_need_not_end_with_a_step() -> None:
    # 8 rows a step: 8/20, 16/20, then the peak is passed within the third step.
    config = run(train_rows=80, batch=8, lr_warmup_rows=20, lr_decay_style="linear")
    assert rates(config) == pytest.approx([0.4, 0.8, *[(80 - n) / 60 for n in range(24, 81, 8)]])
    assert rates(run(batch=8, lr_warmup_rows=16)) == rates(run(batch=8, lr_warmup_steps=2))


def ramped(**schedule: Any) -> RunConfig:
    """Return a run of 2, 2, 4, 6, 8 and 8 rows a step: 2, 4, 8, 14, 22 and 30 rows when they end."""
    config = run(batch=8, train_steps=6, **schedule).model_dump(mode="json")
    config["batch"]["rampup_batch_size"] = {"start": 2, "increment": 2, "rows": 12}
    return config_from_mapping(config, RunConfig, source="test")


def test_under_a_batch_size_ramp_rates_move_with_the_rows() -> None:
    assert rates(ramped(lr_decay_style="linear")) == pytest.approx([(30 - n) / 30 for n in (2, 4, 8, 14, 22, 30)])
    # Three steps of warm-up are their 8 rows.
    found = rates(ramped(lr_warmup_steps=3, lr_decay_style="linear"))
    assert found == pytest.approx([2 / 8, 4 / 8, 1, (30 - 14) / 22, (30 - 22) / 22, 0])
    assert rates(ramped(lr_warmup_rows=8, lr_decay_style="linear")) == found
    cosine = [0.5 * (1 + math.cos(math.pi * (n - 8) / 22)) for n in (14, 22, 30)]
    assert rates(ramped(lr_warmup_steps=3, lr_decay_style="cosine"))[3:] == pytest.approx(cosine, abs=1e-12)
    # The last two steps are the 16 rows from 14 on; so is 8 / 15 of the run.
    for length in ({"lr_wsd_decay_steps": 2}, {"lr_wsd_decay_rows": 16}, {"lr_wsd_decay_fraction": 8 / 15}):
        assert rates(ramped(lr_decay_style="wsd", **length)) == pytest.approx([1, 1, 1, 1, 0.5, 0])
    roots = [math.sqrt(4 / n) for n in (8, 14, 22, 30)]
    assert rates(ramped(lr_warmup_rows=4, lr_decay_style="inverse_square_root")) == pytest.approx([0.5, 1, *roots])


STEPS, WARMUP, DECAY, PEAK = 40, 6, 10, 3e-4


def huggingface(get: Callable[..., Any], **settings: Any) -> list[float]:
    """Return the rates of steps 1, 2 ...; a schedule of `transformers` begins with that of step 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get(optimizer, **settings)
    found = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


@pytest.mark.parametrize(
    ("ours", "get", "theirs"),
    [
        ({}, transformers.get_constant_schedule_with_warmup, {}),
        ({"lr_decay_style": "linear"}, transformers.get_linear_schedule_with_warmup, {"num_training_steps": STEPS}),
        ({"lr_decay_style": "cosine"}, transformers.get_cosine_schedule_with_warmup, {"num_training_steps": STEPS}),
        ({"lr_decay_style": "inverse_square_root"}, transformers.get_inverse_sqrt_schedule, {}),
        *[
            (
                {"lr_decay_style": "wsd", "lr_wsd_decay_steps": DECAY, "lr_wsd_decay_style": shape},
                transformers.get_wsd_schedule,
                {"num_decay_steps": DECAY, "num_training_steps": STEPS, "decay_type": theirs},
            )
            for shape, theirs in (("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt"))
        ],
    ],
    ids=["constant", "linear", "cosine", "inverse_square_root", "wsd-linear", "wsd-cosine", "wsd-minus_sqrt"],
)
def test_equals_transformers(ours: dict[str, Any], get: Callable[..., Any], theirs: dict[str, Any]) -> None:
    config = run(PEAK, train_steps=STEPS, lr_warmup_steps=WARMUP, **ours)
    expected = huggingface(get, num_warmup_steps=WARMUP, **theirs)
    assert rates(config) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"lr_decay_style": "wsd"}, "needs exactly one of .* given: none"),
        ({"lr_decay_style": "wsd", "lr_wsd_decay_steps": 2, "lr_wsd_decay_fraction": 0.1}, "needs exactly one of"),
        ({"lr_decay_style": "linear", "lr_wsd_decay_steps": 2}, "lr_wsd_decay_steps needs lr_decay_style=wsd"),
        ({"lr_decay_style": "inverse_square_root"}, "give schedule.lr_warmup_steps"),
        ({"lr_warmup_steps": 2, "lr_warmup_rows": 8}, "give one of schedule.lr_warmup_steps=2"),
        ({"lr_decay_style": "wsd", "lr_warmup_steps": 7, "lr_wsd_decay_steps": 4}, "warm-up and decay"),
        ({"lr_warmup_rows": 10 * 2048 + 1}, "warm-up and decay"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**schedule)
