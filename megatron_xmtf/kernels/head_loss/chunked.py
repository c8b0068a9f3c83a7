"""The language-model head and its loss over a vocabulary split over ranks, a few positions at a time.

    positions        0 1 2 | 3 4 5 | 6          chunks of as many as `logits_at_once` allows
    forward          logits of a chunk -> of each position: largest, sum of exp, that of the label; then dropped
    over the ranks   one maximum and one sum of [n] numbers, whatever the number of chunks
    backward         logits of a chunk again -> softmax - onehot(label) -> gradients of hidden and weight

Where all positions are one chunk its exponentials are kept instead, and nothing is computed twice. So at most
`logits_at_once` logits are ever held, for any number of positions; the price beyond one chunk is a third matrix product
more (8 n h v floating-point operations instead of 6 n h v).

    n positions, h hidden_size, v words of this rank (padded ones are left out of every product)

Nothing waits for the device, and without positions no rank communicates: those of a tensor-parallel group see the same
batch, so all of them have none.

Source:  losses and gradients as Megatron-Core's `vocab_parallel_cross_entropy`; chunks that are computed again, Wijmans
         et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["LOGITS_AT_ONCE", "VocabularyShard", "chunks_of", "head_loss", "join_ranks"]

LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits that are held at once, by device: 256 MiB and 1 GiB in fp32. On a GPU a chunk must be wide enough that adding
up the weight's gradient, [v, h] a chunk, stays small beside the products."""


@dataclass(frozen=True)
class VocabularyShard:
    """The words of the vocabulary that this rank holds."""

    first: int
    """Id of the first word."""
    count: int
    """Real words; rows of the weight from there on only pad the vocabulary, and get no gradient."""
    group: torch.distributed.ProcessGroup | None = None
    """The tensor-parallel ranks; None: this rank holds the whole vocabulary."""
    reduces_hidden: bool = True
    """Whether the gradient of hidden is summed over the ranks here; False where the caller does it."""


def head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, shard: VocabularyShard, logits_at_once: int | None = None
) -> Tensor:
    """Return the cross-entropy of each position, fp32 [n], the same on every rank of the group.

    Args:    hidden: [n, h], the same on every rank of the group. weight: [vocab / tp, h], this rank's rows.
             labels: int64 [n], ids of the whole vocabulary. logits_at_once: bound of memory, by default by device.
    """
    limit = logits_at_once or LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cuda"])
    losses: Tensor = _HeadLoss.apply(hidden, weight, labels, shard, max(1, limit // max(shard.count, 1)))
    return losses


class _HeadLoss(torch.autograd.Function):
    """Forward and backward of `head_loss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, chunk_size: int
    ) -> Tensor:
        columns = labels - shard.first
        is_own = (columns >= 0) & (columns < shard.count)
        columns = columns.clamp(0, max(shard.count - 1, 0))
        # Of this rank's words, fp32 [n]: the largest logit, the sum of exp(logit - largest), the label's logit or 0.
        largest = torch.full(labels.shape, -math.inf, dtype=torch.float32, device=hidden.device)
        sums, of_label = torch.zeros_like(largest), torch.zeros_like(largest)
        kept = None
        for chunk in chunks_of(len(hidden), chunk_size, shard):
            kept = None  # the last chunk's memory is free before the next one's is taken
            logits = _logits(hidden[chunk], weight, shard)
            of_label[chunk] = logits.gather(1, columns[chunk, None]).squeeze(1)
            largest[chunk] = logits.amax(dim=1)
            kept = logits.sub_(largest[chunk, None]).exp_()
            sums[chunk] = kept.sum(dim=1)
            del logits
        if len(hidden) > chunk_size:
            kept = None
        of_label.mul_(is_own)
        own_largest = largest
        largest, sums, of_label = join_ranks(largest, sums, of_label, shard)
        log_sums = sums.log()
        # What is left to subtract of the logits, or of those kept, before exp gives the softmax.
        shift = largest + log_sums if kept is None else (largest - own_largest) + log_sums
        ctx.save_for_backward(hidden, weight, columns, is_own, shift, kept)
        ctx.shard, ctx.chunk_size = shard, chunk_size
        return log_sums - (of_label - largest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, is_own, shift, kept = ctx.saved_tensors
        shard, (of_losses,) = ctx.shard, gradients
        words = weight[: shard.count]
        of_hidden = torch.zeros_like(hidden)
        # In fp32 where chunks are added up: half precision would round after each.
        several = len(hidden) > ctx.chunk_size
        of_weight = torch.zeros_like(weight, dtype=torch.float32 if several else None)
        of_label = torch.where(is_own, -of_losses, 0.0)
        for chunk in chunks_of(len(hidden), ctx.chunk_size, shard):
            if kept is None:
                softmax = _logits(hidden[chunk], weight, shard).sub_(shift[chunk, None]).exp_()
                softmax.mul_(of_losses[chunk, None])
            else:
                softmax = kept.mul_((of_losses * (-shift).exp())[:, None])
            softmax.scatter_add_(1, columns[chunk, None], of_label[chunk, None])
            of_logits = softmax.to(hidden.dtype)
            del softmax
            torch.mm(of_logits, words, out=of_hidden[chunk])
            own = of_weight[: shard.count]
            if own.dtype == of_logits.dtype:
                own.addmm_(of_logits.t(), hidden[chunk])
            else:
                own.add_(of_logits.t() @ hidden[chunk])
            del of_logits
        if shard.group is not None and shard.reduces_hidden and len(hidden):
            torch.distributed.all_reduce(of_hidden, group=shard.group)
        return of_hidden, of_weight.to(weight.dtype), None, None, None


def join_ranks(largest: Tensor, sums: Tensor, of_label: Tensor, shard: VocabularyShard) -> tuple[Tensor, ...]:
    """Join what each rank knows of its own words into the same of all words: fp32 [n] each.

    Args:    largest: logit; sums: of exp(logit - largest); of_label: its logit, 0 on ranks that do not hold it.
    """
    if shard.group is None or not len(largest):
        return largest, sums, of_label
    of_all = largest.clone()
    torch.distributed.all_reduce(of_all, op=torch.distributed.ReduceOp.MAX, group=shard.group)
    both = torch.stack([sums * (largest - of_all).exp(), of_label])
    torch.distributed.all_reduce(both, group=shard.group)
    return of_all, *both.unbind()


def chunks_of(count: int, chunk_size: int, shard: VocabularyShard) -> Iterator[slice]:
    """Cut positions into chunks; there is none for a rank that holds no real word."""
    for begin in range(0, count if shard.count else 0, chunk_size):
        yield slice(begin, min(begin + chunk_size, count))


def _logits(hidden: Tensor, weight: Tensor, shard: VocabularyShard) -> Tensor:
    """Return the logits of this rank's real words, fp32 [positions, v], in memory of their own."""
    return (hidden @ weight[: shard.count].t()).float()
