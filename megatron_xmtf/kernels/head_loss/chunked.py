"""The language-model head and its loss over a vocabulary split over ranks, in bounded memory.

    n positions, h hidden_size, v words of this rank (padded ones are left out of every product)

    forward         a few positions, all words   logits -> of each position: largest, sum of exp, that of the label
    over the ranks  one maximum and one sum of [n] numbers, whatever the number of chunks
    backward        all positions, a few words   logits again -> (softmax - onehot(label)) * gradient of the loss
                                                 -> these words' rows of the weight's gradient, whole;
                                                    their part of hidden's, added up in fp32

So each number of the weight's gradient, the largest result by far, is written once, and what is added up over chunks is
[n, h]. Where all logits may be held at once they are kept, and nothing is computed twice. So at most `logits_at_once`
logits are ever held, in the precision of hidden, for any number of positions; the price beyond that is a third matrix
product more (8 n h v floating-point operations instead of 6 n h v).

Where the same rank's embedding has the weight too, and a gradient of many micro-batches is added up in fp32
(`main_grad`), the weight's gradient goes there, a part of its rows at a time: autograd would add it to the embedding's
in half precision, and hold it whole until then. It is the embedding's that autograd then brings to the weight.

What is done to logits is `TORCH` here, and in `fused.py` two Triton kernels. Nothing waits for the device, and without
positions no rank communicates: those of a tensor-parallel group see the same batch, so all of them have none.

Source:  losses and gradients as Megatron-Core's `vocab_parallel_cross_entropy`; logits that are computed again, Wijmans
         et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["LOGITS_AT_ONCE", "LogitOperations", "VocabularyShard", "apply_head_loss", "head_loss"]

LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits that are held at once, by device: in bf16 128 MiB and 512 MiB. On a GPU a chunk must be wide enough for the
matrix products to fill the device."""
WIDE_AT_ONCE = 1 << 24
"""Logits that `TORCH` holds in fp32 beside them: 64 MiB."""
GRADIENT_AT_ONCE = 1 << 26
"""Numbers of the weight's gradient that are made at once where they are added to what is there: in bf16 128 MiB."""
ALIGNED_WORDS = 256
"""Words of a chunk are a multiple of this, so that rows of logits begin where tensor cores want them."""


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
    is_embedding: bool = False
    """Whether the weight is the embedding of this very rank, whose gradient autograd brings to it."""


@dataclass(frozen=True)
class LogitOperations:
    """What is done to logits [c, w], which are in the precision of hidden, between the matrix products.

    columns: int64 [c], the place of each position's label among these words, outside of [0, w) if it is not there.
    """

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """logits, columns -> largest, sum of exp(logit - largest), that of the label or 0: fp32 [c] each."""
    turn_into_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """logits, columns, log of the sum of exp over all words, gradient of the losses: logits become their gradient."""


def head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, shard: VocabularyShard, logits_at_once: int | None = None
) -> Tensor:
    """Return the cross-entropy of each position, fp32 [n], the same on every rank of the group.

    Args:    hidden: [n, h], the same on every rank of the group. weight: [vocab / tp, h], this rank's rows.
             labels: int64 [n], ids of the whole vocabulary. logits_at_once: bound of memory, by default by device.
    """
    return apply_head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once, operations=TORCH)


def apply_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard,
    logits_at_once: int | None,
    operations: LogitOperations,
) -> Tensor:
    """Return what `head_loss` does, with the given operations on logits."""
    limit = logits_at_once or LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cuda"])
    losses: Tensor = _HeadLoss.apply(hidden, weight, labels, shard, limit, operations)
    return losses


class _HeadLoss(torch.autograd.Function):
    """Forward and backward of `head_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabularyShard,
        limit: int,
        operations: LogitOperations,
    ) -> Tensor:
        # Rows that only pad the vocabulary belong to nobody; a label there would be another rank's.
        columns = labels - shard.first
        columns = columns.masked_fill(columns >= shard.count, -1)
        words = weight[: shard.count]
        largest = torch.full(labels.shape, -math.inf, dtype=torch.float32, device=hidden.device)
        sums, of_label = torch.zeros_like(largest), torch.zeros_like(largest)
        kept = None
        for chunk in _cut(len(hidden) if shard.count else 0, limit // max(shard.count, 1)):
            kept = None  # the last chunk's memory is free before the next one's is taken
            kept = hidden[chunk] @ words.t()
            largest[chunk], sums[chunk], of_label[chunk] = operations.statistics(kept, columns[chunk])
        if kept is not None and len(kept) < len(hidden):
            kept = None
        largest, sums, of_label = join_ranks(largest, sums, of_label, shard)
        log_sums = sums.log()
        ctx.save_for_backward(hidden, weight, columns, largest + log_sums, kept)
        ctx.shard, ctx.limit, ctx.operations = shard, limit, operations
        # What is saved comes back without its attributes.
        ctx.main_grad = getattr(weight, "main_grad", None) if shard.is_embedding else None
        return log_sums - (of_label - largest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, log_sums, kept = ctx.saved_tensors
        shard, of_losses = ctx.shard, gradients[0].contiguous()
        if not len(hidden):
            of_nothing = None if ctx.main_grad is not None else torch.zeros_like(weight)
            return torch.zeros_like(hidden), of_nothing, None, None, None, None
        at_once = shard.count if kept is not None else ctx.limit // len(hidden)
        chunks = list(_cut(shard.count, at_once, multiple=ALIGNED_WORDS))
        # In fp32 where chunks are added up: half precision would round after each.
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32 if len(chunks) > 1 else None)
        of_weight = None
        if ctx.main_grad is None:
            of_weight = torch.empty_like(weight)
            of_weight[shard.count :] = 0.0
        for chunk in chunks:
            words = weight[chunk]
            of_logits = hidden @ words.t() if kept is None else kept
            ctx.operations.turn_into_gradient(of_logits, columns - chunk.start, log_sums, of_losses)
            if of_weight is not None:
                torch.mm(of_logits.t(), hidden, out=of_weight[chunk])
            else:
                _add_products(ctx.main_grad[chunk], of_logits, hidden)
            if of_hidden.dtype == of_logits.dtype:
                of_hidden.addmm_(of_logits, words)
            else:
                of_hidden.add_(of_logits @ words)
            del of_logits
        of_hidden = of_hidden.to(hidden.dtype)
        if shard.group is not None and shard.reduces_hidden:
            torch.distributed.all_reduce(of_hidden, group=shard.group)
        return of_hidden, of_weight, None, None, None, None


def _add_products(total: Tensor, of_logits: Tensor, hidden: Tensor) -> None:
    """Add the gradient of some words' rows [w, h] to `total`, some of these rows at a time.

    Args:  of_logits: [n, w].
    """
    for words in _cut(len(total), GRADIENT_AT_ONCE // hidden.size(1), multiple=ALIGNED_WORDS):
        total[words].add_(of_logits[:, words].t() @ hidden)


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


def _cut(count: int, at_once: int, *, multiple: int = 1) -> Iterator[slice]:
    """Cut [0, count) into slices of equal length, but for the last, of at most `at_once` and at least 1.

    Args:  multiple: of the length, where it is that long.
    """
    if not count:
        return
    pieces = -(-count // max(1, at_once))
    length = -(-count // pieces)
    if length > multiple and pieces > 1:
        length -= length % multiple
    for begin in range(0, count, length):
        yield slice(begin, min(begin + length, count))


def _statistics(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `LogitOperations`; logits stay as they are."""
    largest = logits.amax(dim=1).float()
    sums = torch.empty_like(largest)
    for rows in _cut(len(logits), WIDE_AT_ONCE // logits.size(1)):
        sums[rows] = (logits[rows].float() - largest[rows, None]).exp_().sum(dim=1)
    is_own = (columns >= 0) & (columns < logits.size(1))
    of_label = logits.gather(1, columns.clamp(0, logits.size(1) - 1)[:, None]).squeeze(1).float()
    return largest, sums, of_label.mul_(is_own)


def _turn_into_gradient(logits: Tensor, columns: Tensor, log_sums: Tensor, of_losses: Tensor) -> None:
    """See `LogitOperations`."""
    is_own = (columns >= 0) & (columns < logits.size(1))
    of_label = torch.where(is_own, -of_losses, 0.0)[:, None]
    places = columns.clamp(0, logits.size(1) - 1)[:, None]
    for rows in _cut(len(logits), WIDE_AT_ONCE // logits.size(1)):
        softmax = logits[rows].float()  # the logits themselves in fp32, a copy in half precision
        softmax.sub_(log_sums[rows, None]).exp_().mul_(of_losses[rows, None])
        softmax.scatter_add_(1, places[rows], of_label[rows])
        if softmax.dtype != logits.dtype:
            logits[rows] = softmax


TORCH = LogitOperations(statistics=_statistics, turn_into_gradient=_turn_into_gradient)
