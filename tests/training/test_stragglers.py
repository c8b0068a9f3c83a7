"""A rank that does the same work more slowly is named; equal ranks are not, however unevenly they begin."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.stragglers import OwnWork, slow_ranks
from megatron_xmtf.training.trainer import Trainer

SLEEP_SECONDS = 0.25
"""In each micro-batch: several times what a step of the tiny model takes, also on a busy machine."""


def works(*milliseconds: float) -> list[OwnWork]:
    return [OwnWork(rank, (0, 0), f"node{rank}", value) for rank, value in enumerate(milliseconds)]


@pytest.mark.parametrize(
    ("milliseconds", "named"),
    [
        ((62.0, 81.0), [1]),
        ((81.0, 62.0, 62.0, 62.0), [0]),
        ((62.0, 90.0, 61.0, 100.0, 63.0), [3, 1]),
        ((62.0, 70.0, 66.0), []),
        ((50.0,), []),
    ],
)
def test_ranks_beyond_the_ratio_are_named_the_slowest_first(milliseconds: tuple[float, ...], named: list[int]) -> None:
    assert [work.rank for work, _ in slow_ranks(works(*milliseconds), ratio=1.25)] == named


def test_stages_are_not_compared_with_each_other() -> None:
    stages = [
        OwnWork(rank, (stage, 0), "node", value)
        for rank, (stage, value) in enumerate([(0, 90.0), (1, 40.0), (0, 91.0), (1, 60.0)])
    ]
    assert [(work.rank, median) for work, median in slow_ranks(stages, ratio=1.25)] == [(3, 40.0)]


def rank_trains(prepared: PreparedRun, sleeper: int | None) -> list[str]:
    """Train some steps, with one rank that sleeps in its own work; return what this rank warned of."""
    warnings: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logging.getLogger("megatron_xmtf.training.stragglers").addHandler(Keep())
    trainer: Any = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    if trainer.topology.rank == sleeper:
        forward = trainer._forward_step

        def slowly(*arguments: Any) -> Any:
            time.sleep(SLEEP_SECONDS)
            return forward(*arguments)

        trainer._forward_step = slowly
    trainer.run()
    return warnings


def test_a_pipeline_alone_has_nothing_to_compare(run_config: Callable[..., RunConfig]) -> None:
    logged = {"straggler_check_interval": 4, "straggler_ratio": 1.01}
    sections = {"parallel": {"pipeline_model_parallel_size": 2}, "schedule": {"train_steps": 4}}
    prepared = prepare_run(run_config(logging=logged, **sections), world_size=2)
    assert run_ranks(rank_trains, world_size=2, arguments=(prepared, 1)) == [[], []]


@pytest.mark.parametrize("sleeper", [1, None])
def test_a_rank_that_sleeps_in_each_step_is_named(sleeper: int | None, run_config: Callable[..., RunConfig]) -> None:
    # Without a sleeper the limit lies beyond what a busy machine makes of equal ranks.
    ratio = 2.0 if sleeper is not None else 20.0
    logged = {"straggler_check_interval": 5, "straggler_ratio": ratio}
    prepared = prepare_run(run_config(logging=logged, schedule={"train_steps": 5}), world_size=2)
    first, second = run_ranks(rank_trains, world_size=2, arguments=(prepared, sleeper))
    assert second == [], "rank 0 speaks for all"
    if sleeper is None:
        assert first == []
    else:
        [warning] = first
        assert warning.startswith("steps 3 to 5: all ranks wait for the forward and backward passes of rank 1 on ")
        assert "straggler_ratio=2" in warning
