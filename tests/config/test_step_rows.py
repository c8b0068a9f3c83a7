"""Which rows each step reads under a batch-size ramp: by hand, and as Megatron-Core's calculator says."""

from __future__ import annotations

import random
from typing import Any

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.config.step_rows import StepRows
from megatron_xmtf.errors import ConfigError

RAMP = {"start": 2, "increment": 2, "rows": 12}


def run(schedule: dict[str, Any], *, global_batch_size: int = 8, ramp: dict[str, int] | None = RAMP) -> RunConfig:
    values = {
        "model": "m",
        "output": "o",
        "data": {"train": [{"prefix": "p"}]},
        "batch": {"global_batch_size": global_batch_size, "rampup_batch_size": ramp},
        "schedule": schedule,
    }
    return config_from_mapping(values, RunConfig, source="test")


def test_a_ramp_by_hand() -> None:
    rows = StepRows(8, 2, 2, 12)
    # Three increments, after 4, 8 and 12 rows. The step that begins at row 8 has 6 rows and passes row 12.
    assert [rows.of(step) for step in range(7)] == [2, 2, 4, 6, 8, 8, 8]
    assert [rows.before(step) for step in range(8)] == [0, 2, 4, 8, 14, 22, 30, 38]
    assert [rows.step_of(row) for row in (0, 1, 2, 3, 4, 7, 8, 13, 14, 21, 22)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert list(rows.sizes) == [2, 4, 6, 8]


def test_steps_that_pass_several_increments_at_once() -> None:
    # Increments after 1, 2, 3 and 4 rows: the first step of 4 rows has passed them all.
    rows = StepRows(8, 4, 1, 4)
    assert [(rows.before(step), rows.of(step)) for step in range(3)] == [(0, 4), (4, 8), (12, 8)]


def test_without_a_ramp_steps_are_equal() -> None:
    rows = StepRows(8)
    assert [(rows.before(step), rows.of(step)) for step in (0, 1, 50)] == [(0, 8), (8, 8), (400, 8)]
    assert (rows.step_of(7), rows.step_of(8), list(rows.sizes)) == (0, 1, [8])


def random_ramps() -> list[tuple[int, int, int, int]]:
    generator = random.Random(0)
    ramps = []
    for _ in range(200):
        start, increment = generator.randint(1, 40), generator.randint(1, 20)
        ramps.append((start + increment * generator.randint(1, 30), start, increment, generator.randint(1, 3000)))
    return ramps


@pytest.mark.parametrize("ramps", [[(2048, 192, 16, 9_765_625)], random_ramps()], ids=["BLOOM-176B", "random"])
def test_megatron_counts_the_same(ramps: list[tuple[int, int, int, int]]) -> None:
    for ramp in ramps:
        rows, consumed, step = StepRows(*ramp), 0, 0
        theirs = RampupBatchsizeNumMicroBatchesCalculator(ramp[0], 1, 1, False, 1, *ramp[1:])
        while consumed < 1.2 * ramp[3] + 2 * ramp[0]:
            theirs.update(consumed, consistency_check=True)
            size = theirs.get_current_global_batch_size()
            assert (rows.before(step), rows.of(step)) == (consumed, size), f"step {step} of {ramp}"
            assert rows.step_of(consumed) == rows.step_of(consumed + size - 1) == step
            assert size in rows.sizes
            consumed, step = consumed + size, step + 1
        assert rows.of(step) == ramp[0], "the ramp has ended"


def test_the_length_of_a_run_in_rows_and_in_steps() -> None:
    assert (run({"train_steps": 5}).train_steps, run({"train_steps": 5}).train_rows) == (5, 22)
    assert (run({"train_rows": 30}).train_steps, run({"train_rows": 30}).train_rows) == (6, 30)
    assert run({"train_steps": 5}, ramp=None).train_rows == 40


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"schedule": {"train_rows": 16}}, "train_rows=16 does not end with a step of the ramp; use 14 or 22"),
        ({"schedule": {"train_rows": 1}}, "train_rows=1 does not end with a step of the ramp; use 2"),
        ({"schedule": {"train_rows": 17}, "ramp": None}, "not a multiple of batch.global_batch_size=8; use 16 or 24"),
        ({"ramp": {**RAMP, "start": 8}}, "start=8 must be less than batch.global_batch_size=8"),
        ({"ramp": {**RAMP, "increment": 4}}, "from 2 to batch.global_batch_size=8, by 6, .* multiple of increment=4"),
        ({"ramp": {**RAMP, "rows": 0}}, "rows.*greater than or equal to 1"),
        ({"ramp": {"start": 2, "increment": 2}}, "rampup_batch_size.rows"),
        ({"schedule": {"train_steps": 5, "lr_warmup_steps": 6}}, "lr_warmup_steps=6 is more than the run's 5 steps"),
        (
            {"schedule": {"train_steps": 5, "lr_decay_style": "wsd", "lr_wsd_decay_steps": 6}},
            "lr_wsd_decay_steps=6 is more than the run's 5 steps",
        ),
        ({"schedule": {"train_steps": 5, "lr_warmup_rows": 23}}, "take 23 and 0 rows, the run has 22"),
    ],
)
def test_ramps_that_cannot_be_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**{"schedule": {"train_steps": 5}, **sections})
