"""Find the rank that all others wait for: a throttled GPU, a shared core, a slow disk.

    rank 0   forward and backward 62 ms | waits | gradients summed over the copies of the model | update
    rank 1   forward and backward 81 ms         | gradients ...                                 | update
             ^ own work                           the step takes as long as the slowest copy's work

Ranks of one copy (tensor and pipeline parallel) wait for each other within its work, and its stages have other work
each: a rank is compared with those in its place in the other copies, and a slow copy is named with all its ranks. A
single copy has nothing to be compared with, and nothing is measured. BLOOM's training lost 5 % to one slow GPU, which
was found by bisection (ml-engineering).
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_xmtf.checkpoint.agreement import gather
from megatron_xmtf.parallel.topology import Topology

__all__ = ["OwnWork", "StragglerWatch", "slow_ranks"]

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
"""First steps of a run, which compile and allocate; they count for nobody."""


@dataclass(frozen=True)
class OwnWork:
    """What one rank did on average between two looks."""

    rank: int
    place: tuple[int, int]
    """Pipeline stage and tensor-parallel rank: what it is compared within."""
    host: str
    milliseconds: float
    """Mean of a step's forward and backward passes, until gradients are summed over the copies of the model."""


class StragglerWatch:
    """Measure this rank's own work in every step; compare it with the others' now and then.

    Args:    interval: steps between comparisons; None: nothing is measured. ratio: of a rank's work to the median's.
    """

    def __init__(self, topology: Topology, *, interval: int | None, ratio: float) -> None:
        self._rank, self._place = topology.rank, (topology.pp_rank, topology.tp_rank)
        self._interval, self._ratio = interval if topology.dp_size > 1 else None, ratio
        self._on_gpu = torch.cuda.is_available()
        self._began: float | torch.cuda.Event = 0.0
        self._ended: float | torch.cuda.Event = 0.0
        self._steps = 0
        self._measured: list[float] = []

    def begin(self) -> None:
        """Call before the forward pass of a step."""
        self._began = self._ended = self._now()

    def own_work_done(self) -> None:
        """Call when all backward passes of this rank are done and nothing is summed yet."""
        self._ended = self._now()

    def after_step(self, step: int) -> None:
        """Take note of a step, whose work on the device is done; every rank calls it.

        Raises:  nothing: a slow rank is told, and the run goes on.
        """
        if self._interval is None:
            return
        self._steps += 1
        if self._steps > WARM_UP_STEPS:
            self._measured.append(_milliseconds(self._began, self._ended))
        if self._steps % self._interval or not self._measured:
            return
        own = OwnWork(self._rank, self._place, socket.gethostname(), statistics.fmean(self._measured))
        steps, self._measured = len(self._measured), []
        everybody: list[OwnWork] = gather(own)
        slow = slow_ranks(everybody, ratio=self._ratio)
        if slow and self._rank == 0:
            named = ", ".join(
                f"rank {work.rank} on {work.host} ({work.milliseconds:.1f} ms; others {median:.1f})"
                for work, median in slow[:8]
            )
            logger.warning(
                "steps %d to %d: all ranks wait for the forward and backward passes of %s%s. Look at that machine's "
                "clocks, temperature and other users; logging.straggler_ratio=%g is the limit.",
                step - steps + 1,
                step,
                named,
                f" and {len(slow) - 8} more" if len(slow) > 8 else "",
                self._ratio,
            )

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slow_ranks(everybody: Sequence[OwnWork], *, ratio: float) -> list[tuple[OwnWork, float]]:
    """Return the ranks whose work takes more than `ratio` times the median of their place, the slowest first.

    The median is the lower one, so that of two ranks the slow one is seen.

    Returns: the work, and the median in ms.
    """
    by_place: dict[tuple[int, int], list[float]] = {}
    for work in everybody:
        by_place.setdefault(work.place, []).append(work.milliseconds)
    medians = {place: statistics.median_low(values) for place, values in by_place.items()}
    slow = [(work, medians[work.place]) for work in everybody if work.milliseconds > ratio * medians[work.place]]
    return sorted(slow, key=lambda pair: -pair[0].milliseconds / pair[1])


def _milliseconds(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return 1000 * (ended - began)
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event), "both of one clock"
    return began.elapsed_time(ended)
