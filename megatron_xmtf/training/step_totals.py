"""Loss and counts of a step over all ranks: what the last pipeline stages have, added up and handed to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed
from megatron.core import parallel_state
from torch import Tensor

from megatron_xmtf.models.forward import MicroBatch
from megatron_xmtf.training.loss import global_batch_loss
from megatron_xmtf.training.metrics import StepCounts, peak_memory_gib

__all__ = ["Agreed", "agree", "step_totals"]


def step_totals(
    reports: list[Tensor], batches: Sequence[MicroBatch], *, device: torch.device
) -> tuple[float, StepCounts]:
    """Return the loss and the counts of the global batch, the same on every rank; a collective call.

    Args:    reports: of `micro_batch_loss`, one a micro-batch on the last pipeline stage; empty on the others.
             batches: this rank's micro-batches, the same on all ranks of its pipeline.
    """
    numbers = torch.tensor([0.0, 0.0, *astuple(StepCounts.of(batches))], dtype=torch.float64, device=device)
    if reports:
        numbers[:2] = global_batch_loss(reports)
    torch.distributed.all_reduce(numbers, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            numbers,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    weighted, units, *totals = numbers.tolist()
    return weighted / max(units, 1.0), StepCounts(*map(int, totals))


@dataclass(frozen=True)
class Agreed:
    """What all ranks know together before an update."""

    peak_memory_gib: float
    """The most that any rank has held so far, the update of this step not yet counted."""
    bad_gradients: bool
    """Whether any rank has NaN or Inf in its gradients."""
    stop: int
    """The weightiest reason to stop that any rank knows; see `stopping.StopCause`."""


def agree(*, bad_gradients: bool, stop: int, device: torch.device) -> Agreed:
    """Exchange what must be the same on all ranks; a collective call, one all-reduce (MAX) of 24 bytes."""
    numbers = torch.tensor([peak_memory_gib(), bad_gradients, stop], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    peak, bad, cause = numbers.tolist()
    return Agreed(peak, bool(bad), int(cause))
