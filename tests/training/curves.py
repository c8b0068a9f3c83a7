"""Losses and gradient norms of many runs: ranks are forked once and go from layout to layout.

world size 1    run a, run c ... in one process, run b, run d ... in another beside it
world size n    n ranks train one run after the other, in one process group
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.loader import BatchLoader
from megatron_xmtf.data.rows import Row, empty_row
from megatron_xmtf.data.target_counts import count_target_tokens
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import PreparedRun
from megatron_xmtf.training.trainer import Trainer

__all__ = ["Curve", "Run", "curves", "unpack"]

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


@dataclass(frozen=True)
class Run:
    """A run to train for some steps, at `world_size` ranks."""

    prepared: PreparedRun
    world_size: int
    steps: int
    unpacked: bool = False
    """Each example of the packed rows in a row of its own, in micro-batches of eight; at one rank."""


def curves(runs: Mapping[str, Run]) -> dict[str, Curve]:
    """Train all runs and return their curves, which every rank must have reported alike."""
    found: dict[str, Curve] = {}
    for world_size in sorted({run.world_size for run in runs.values()}):
        group = {name: run for name, run in runs.items() if run.world_size == world_size}
        if world_size == 1:
            for part in run_ranks(_train_share, world_size=min(2, len(group)), arguments=(group,)):
                found.update(part)
            continue
        first, *others = run_ranks(_train_all, world_size=world_size, arguments=(group,))
        assert all(other == first for other in others), "every rank reports the same numbers"
        found.update(first)
    return found


def _train_share(runs: dict[str, Run]) -> dict[str, Curve]:
    """Be a job of one rank, beside another, and train every other run."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    del os.environ["XMTF_RENDEZVOUS_FILE"]
    return _train_all(dict(list(runs.items())[rank::size]))


def _train_all(runs: dict[str, Run]) -> dict[str, Curve]:
    # Two threads on cores that others use as well wait for each other.
    torch.set_num_threads(1)
    found = {}
    for name, run in runs.items():
        topology = initialize_parallel(run.prepared.config.parallel, seed=run.prepared.config.seed)
        trainer = Trainer(run.prepared, topology)
        if run.unpacked:
            trainer.loader = _UnpackedLoader(trainer.loader)
        metrics = [trainer.train_step() for _ in range(run.steps)]
        found[name] = [(step["loss"], step["grad_norm"]) for step in metrics]
        parallel_state.destroy_model_parallel()
    return found


class _UnpackedLoader(BatchLoader):
    """The examples of each step, one a row."""

    def __init__(self, packed: BatchLoader) -> None:
        self.packed = packed

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the step's examples in micro-batches of eight rows, the last filled up with padding."""
        packed = self.packed
        begin, size = packed.step_rows.before(step), packed.step_rows.of(step)
        alone = [row for number in range(begin, begin + size) for row in unpack(packed.rows[number])]
        padding = empty_row(sequence_length=packed.rows.sequence_length, pad_id=packed.rows.pad_id)
        alone += [padding] * (-len(alone) % 8)
        counts = count_target_tokens(packed.rows, begin, count=size) if packed.normalization == "dataset" else None
        return [
            build_batch(alone[first : first + 8], normalization=packed.normalization, dataset_target_tokens=counts)
            for first in range(0, len(alone), 8)
        ]


def unpack(row: Row) -> list[Row]:
    """Give each example of a row a row of its own, as long and at its beginning."""
    rows = []
    for place in range(len(row.example_ids)):
        inside = row.segment_ids == place + 1
        tokens, segment_ids, is_target = map(np.zeros_like, (row.tokens, row.segment_ids, row.is_target))
        count = int(inside.sum())
        tokens[:count], segment_ids[:count], is_target[:count] = row.tokens[inside], 1, row.is_target[inside]
        own = slice(place, place + 1)
        rows.append(Row(tokens, segment_ids, is_target, row.dataset_ids[own], row.example_ids[own]))
    return rows
