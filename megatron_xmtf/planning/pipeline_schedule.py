"""When each stage of a pipeline computes what: the order that Megatron-Core runs, and its times, simulated.

    1F1B, 3 stages, 4 micro-batches; a forward pass takes 1, a backward pass 2; lower case is backward

    stage 0   A B C . . . . a a D b b . c c . d d
    stage 1   . A B . . a a C b b D c c . d d . .
    stage 2   . . A a a B b b C c c D d d . . . .        4 x 3 of work, (3 - 1) x 3 of bubble

A stage begins with p - i - 1 forward passes, then takes turns, and ends with as many backward passes. With v chunks a
stage, micro-batches go through chunk 0 in groups of p, then through chunk 1, and so on; it begins with
2 (p - i - 1) + (v - 1) p forward passes.

Source:  Narayanan et al. 2021, arXiv 2104.04473, figures 3 and 4; Megatron-Core 0.16, pipeline_parallel/schedules.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Pass", "makespan", "pass_order", "simulate"]


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of a micro-batch through a chunk, and when."""

    stage: int
    chunk: int
    micro_batch: int
    is_forward: bool
    start: float
    end: float


Step = tuple[bool, int, int]
"""Whether it is a forward pass, chunk, micro-batch."""


def pass_order(*, stage: int, stages: int, chunks: int, micro_batches: int) -> list[Step]:
    """Return the passes of one stage in the order in which it runs them."""
    total = chunks * micro_batches
    if chunks == 1:
        warmup = min(stages - stage - 1, total)
    elif micro_batches == stages:
        warmup = total
    else:
        warmup = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)

    def place(number: int, *, is_forward: bool) -> Step:
        group, within = divmod(number, stages * chunks)
        chunk, member = divmod(within, stages)
        return is_forward, chunk if is_forward else chunks - 1 - chunk, group * stages + member

    if chunks == 1:
        forward: list[Step] = [(True, 0, number) for number in range(total)]
        backward: list[Step] = [(False, 0, number) for number in range(total)]
    else:
        assert micro_batches % stages == 0, "interleaved schedules take micro-batches in groups of as many as stages"
        forward = [place(number, is_forward=True) for number in range(total)]
        backward = [place(number, is_forward=False) for number in range(total)]
    order = forward[:warmup]
    for number in range(total - warmup):
        order += [forward[warmup + number], backward[number]]
    return order + backward[total - warmup :]


def simulate(
    times: Sequence[Sequence[tuple[float, float]]], *, micro_batches: int, hand_over: float = 0.0
) -> list[Pass]:
    """Run a step: each stage in its order, each pass when what it needs has come.

    Args:    times: seconds (forward, backward) of each stage's chunks. hand_over: seconds from one stage to the next.
    Returns: every pass, in the order in which they end.
    """
    stages, chunks = len(times), len(times[0])
    orders = [
        pass_order(stage=stage, stages=stages, chunks=chunks, micro_batches=micro_batches) for stage in range(stages)
    ]
    done: dict[tuple[int, Step], float] = {}
    free, position, passes = [0.0] * stages, [0] * stages, []
    waiting = list(range(stages))
    while waiting:
        advanced = False
        for stage in waiting:
            while position[stage] < len(orders[stage]):
                step = orders[stage][position[stage]]
                ready = _ready(stage, step, done, stages=stages, chunks=chunks, hand_over=hand_over)
                if ready is None:
                    break
                start = max(free[stage], ready)
                end = start + times[stage][step[1]][0 if step[0] else 1]
                done[stage, step] = free[stage] = end
                passes.append(Pass(stage, step[1], step[2], step[0], start, end))
                position[stage] += 1
                advanced = True
        waiting = [stage for stage in waiting if position[stage] < len(orders[stage])]
        assert advanced or not waiting, "the schedule waits for itself"
    return sorted(passes, key=lambda one: one.end)


def _ready(
    stage: int, step: Step, done: dict[tuple[int, Step], float], *, stages: int, chunks: int, hand_over: float
) -> float | None:
    """Return when a pass can begin; None while what it needs is not done."""
    is_forward, chunk, micro_batch = step
    if is_forward:
        if stage == 0 and chunk == 0:
            return 0.0
        source = (stage - 1, (True, chunk, micro_batch)) if stage else (stages - 1, (True, chunk - 1, micro_batch))
    elif stage == stages - 1 and chunk == chunks - 1:
        return done.get((stage, (True, chunk, micro_batch)))
    elif stage == stages - 1:
        source = (0, (False, chunk + 1, micro_batch))
    else:
        source = (stage + 1, (False, chunk, micro_batch))
    came = done.get(source)
    return None if came is None else came + (hand_over if stages > 1 else 0.0)


def makespan(passes: Sequence[Pass]) -> float:
    """Return when the last pass ends."""
    return max(one.end for one in passes)
