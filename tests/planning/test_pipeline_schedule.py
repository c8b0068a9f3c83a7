"""Pipeline schedules: by hand, against closed formulas and Megatron-Core's order, and what they hold in flight."""

from __future__ import annotations

from collections import defaultdict

import pytest

from megatron_xmtf.config.parallel import ParallelConfig
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.memory_model import chunks_in_flight
from megatron_xmtf.planning.pipeline_schedule import Pass, makespan, pass_order, simulate

SHAPES = [(1, 5, 1), (4, 3, 1), (4, 16, 1), (2, 8, 2), (4, 8, 2), (4, 16, 3), (6, 12, 2)]
"""Stages, micro-batches, chunks."""


def run(stages: int, micro_batches: int, chunks: int) -> list[Pass]:
    return simulate([[(1.0 / chunks, 2.0 / chunks)] * chunks] * stages, micro_batches=micro_batches)


def test_three_stages_by_hand() -> None:
    """The picture in the module's docstring, stage by stage: what starts when."""
    starts = defaultdict(str)
    for one in sorted(run(3, 4, 1), key=lambda one: one.start):
        letter = "ABCD"[one.micro_batch]
        starts[one.stage] += f"{letter if one.is_forward else letter.lower()}{one.start:g} "
    assert starts == {
        0: "A0 B1 C2 a7 D9 b10 c13 d16 ",
        1: "A1 B2 a5 C7 b8 D10 c11 d14 ",
        2: "A2 a3 B5 b6 C8 c9 D11 d12 ",
    }


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SHAPES)
def test_the_bubble_is_the_published_one(stages: int, micro_batches: int, chunks: int) -> None:
    """(p - 1) / v of a micro-batch's forward and backward; Narayanan et al. 2021, section 2.2."""
    wanted = 3 * micro_batches + 3 * (stages - 1) / chunks
    assert makespan(run(stages, micro_batches, chunks)) == pytest.approx(wanted)


def test_the_slowest_stage_paces_the_others() -> None:
    """The time model's m max(s) + sum(s) - max(s): exact for the last stage, up to the warm-up too much before it."""
    for slow in range(4):
        times = [[(1.0, 2.0)] for _ in range(4)]
        times[slow] = [(1.5, 3.0)]
        closed = 16 * 4.5 + 3 * 3.0
        assert 0 <= closed - makespan(simulate(times, micro_batches=16)) <= (3 - slow) * 1.5


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SHAPES)
def test_every_pass_runs_once_in_a_possible_order(stages: int, micro_batches: int, chunks: int) -> None:
    passes = run(stages, micro_batches, chunks)
    place = {(one.stage, one.chunk, one.micro_batch, one.is_forward): one for one in passes}
    assert len(place) == len(passes) == 2 * stages * micro_batches * chunks
    for one in passes:
        depth = one.chunk * stages + one.stage
        if one.is_forward and depth:
            before = place[(depth - 1) % stages, (depth - 1) // stages, one.micro_batch, True]
            assert before.end <= one.start
        if not one.is_forward:
            assert place[one.stage, one.chunk, one.micro_batch, True].end <= one.start
    for stage in range(stages):
        own = sorted((one for one in passes if one.stage == stage), key=lambda one: one.start)
        assert all(first.end <= second.start + 1e-9 for first, second in zip(own, own[1:], strict=False))


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SHAPES)
def test_what_is_in_flight_is_what_the_memory_model_holds(stages: int, micro_batches: int, chunks: int) -> None:
    """Forward passes done and not yet gone backward, at most, counted from the order of the passes."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    layout = Layout(gpus=stages, parallel=parallel, lengths=64, micro_batch_size=1, global_batch_size=micro_batches)
    for stage in range(stages):
        held = most = 0
        for is_forward, _, _ in pass_order(stage=stage, stages=stages, chunks=chunks, micro_batches=micro_batches):
            held += 1 if is_forward else -1
            most = max(most, held)
        assert chunks_in_flight(layout, stage) == most


def test_megatron_core_runs_the_same_order() -> None:
    """Its own table of an interleaved schedule: (micro-batch, chunk) of each forward pass."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    for stages, micro_batches, chunks in ((2, 8, 2), (4, 8, 2), (4, 16, 3)):
        table = get_schedule_table(micro_batches, chunks, stages)
        order = pass_order(stage=0, stages=stages, chunks=chunks, micro_batches=micro_batches)
        assert [(number, chunk) for is_forward, chunk, number in order if is_forward] == [tuple(row) for row in table]
        backward = [(number, chunks - 1 - chunk) for is_forward, chunk, number in order if not is_forward]
        assert backward == [tuple(row) for row in table]
