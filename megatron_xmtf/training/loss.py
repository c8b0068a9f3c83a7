"""The loss of one micro-batch as Megatron-Core wants it: a sum, its divisor, and what to report.

    loss of the step = sum over all micro-batches of sum(losses * loss_weights)
                       / sum over all micro-batches of num_loss_units

Megatron-Core adds up the divisors over micro-batches and data-parallel ranks and scales the gradients once, so the
result does not depend on how the global batch is cut (calculate_per_token_loss, pipeline_parallel/schedules.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_xmtf.models.forward import MicroBatch

__all__ = ["global_batch_loss", "micro_batch_loss"]


def micro_batch_loss(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the losses of one micro-batch.

    Args:    losses: fp32 [micro_batch, sequence], cross-entropy of every position.
    Returns: weighted sum (scalar, with gradient), divisor (int32 scalar), and both as float64 [2] for the report.
    """
    weighted = (losses.float() * batch.loss_weights).sum()
    # Filled on the device: a number copied there would wait for the forward pass to end.
    units = torch.full((), batch.num_loss_units, dtype=torch.int, device=losses.device)
    report = torch.stack([weighted.detach().double(), units.double()])
    return weighted, units, report


def global_batch_loss(reports: list[Tensor]) -> Tensor:
    """Add up one data-parallel rank's reports; [2] float64: weighted sum, divisor."""
    return torch.stack(reports).sum(dim=0)
