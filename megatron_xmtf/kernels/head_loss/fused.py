"""The head and its loss as in `chunked`, with all that is done to logits in two Triton kernels.

    logits of a chunk [c, v], in the precision of hidden, as the matrix product leaves them
    `logit_statistics`    reads them once:            largest, sum of exp(logit - largest), that of the label
    `logit_gradient`      turns them into gradients   (softmax - onehot(label)) * gradient of the loss, in their place

Plain torch makes an fp32 copy of the logits and goes over it several times: 14 bytes a logit in the forward pass after
the product's own 2, and 26 in the backward pass, where these kernels move 2 and 4. For 2,048 positions, 250,880 words
and bf16 that is 20 GB less a micro-batch, 5 ms of an H200's memory beside 10 ms of products at h = 2,048 and 600
TFLOP/s; and a chunk takes a third of the memory (2 bytes a logit, not 6). Computed, not measured.

What is kept, how chunks are computed again, and what ranks tell each other is as in `chunked`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmtf.kernels.head_loss.chunked import LOGITS_AT_ONCE, VocabularyShard, chunks_of, join_ranks

__all__ = ["head_loss", "logit_gradient", "logit_statistics"]

WORDS_AT_ONCE = 4096
"""Words that one step of a kernel takes: 32 a thread of 4 warps."""


def head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, shard: VocabularyShard, logits_at_once: int | None = None
) -> Tensor:
    """Return the cross-entropy of each position, fp32 [n]; arguments as those of `chunked.head_loss`."""
    limit = logits_at_once or LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cuda"])
    losses: Tensor = _FusedHeadLoss.apply(hidden, weight, labels, shard, max(1, limit // max(shard.count, 1)))
    return losses


@triton.jit
def logit_statistics(
    logits_ptr, column_ptr, largest_ptr, sum_ptr, of_label_ptr, stride, num_words, WORDS: tl.constexpr
):
    """Find of one position of logits [c, v]: the largest, the sum of exp(logit - largest), that of its label or 0.

    Args:  column: int64 [c], place of the label among these words; outside of them where another rank holds it.
    """
    position = tl.program_id(0).to(tl.int64)
    row = logits_ptr + position * stride
    largest = tl.full([WORDS], float("-inf"), tl.float32)
    for start in range(0, num_words, WORDS):
        word = start + tl.arange(0, WORDS)
        largest = tl.maximum(largest, tl.load(row + word, mask=word < num_words, other=float("-inf")).to(tl.float32))
    highest = tl.max(largest)
    total = tl.zeros([WORDS], tl.float32)
    # The second reading comes out of the cache: a position's logits are half a megabyte.
    for start in range(0, num_words, WORDS):
        word = start + tl.arange(0, WORDS)
        logits = tl.load(row + word, mask=word < num_words, other=float("-inf")).to(tl.float32)
        total += tl.exp(logits - highest)
    column = tl.load(column_ptr + position)
    is_own = (column >= 0) & (column < num_words)
    of_label = tl.load(row + column, mask=is_own, other=0.0).to(tl.float32)
    tl.store(largest_ptr + position, highest)
    tl.store(sum_ptr + position, tl.sum(total))
    tl.store(of_label_ptr + position, of_label)


@triton.jit
def logit_gradient(logits_ptr, column_ptr, log_sum_ptr, of_loss_ptr, stride, num_words, WORDS: tl.constexpr):
    """Put the gradient of logits [c, v] in their place; grid (positions, blocks of words).

    Args:  log_sum: fp32 [c], log of the sum of exp(logit) over all words. of_loss: fp32 [c].
    """
    position = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    pointers = logits_ptr + position * stride + word
    logits = tl.load(pointers, mask=word < num_words, other=float("-inf")).to(tl.float32)
    softmax = tl.exp(logits - tl.load(log_sum_ptr + position))
    is_label = word == tl.load(column_ptr + position)
    gradient = (softmax - tl.where(is_label, 1.0, 0.0)) * tl.load(of_loss_ptr + position)
    tl.store(pointers, gradient.to(logits_ptr.dtype.element_ty), mask=word < num_words)


class _FusedHeadLoss(torch.autograd.Function):
    """Forward and backward of `head_loss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, chunk_size: int
    ) -> Tensor:
        columns = labels - shard.first
        if shard.count < weight.size(0):
            # Rows that only pad the vocabulary belong to nobody; a label there would be another rank's.
            columns = columns.masked_fill(columns >= shard.count, -1)
        words = weight[: shard.count]
        largest = torch.full(labels.shape, float("-inf"), dtype=torch.float32, device=hidden.device)
        sums, of_label = torch.zeros_like(largest), torch.zeros_like(largest)
        kept = None
        for chunk in chunks_of(len(hidden), chunk_size, shard):
            kept = None  # the last chunk's memory is free before the next one's is taken
            kept = hidden[chunk] @ words.t()
            logit_statistics[(len(kept),)](
                *(kept, columns[chunk], largest[chunk], sums[chunk], of_label[chunk]),
                *(kept.stride(0), shard.count, WORDS_AT_ONCE),
            )
        if len(hidden) > chunk_size:
            kept = None
        largest, sums, of_label = join_ranks(largest, sums, of_label, shard)
        log_sums = sums.log()
        ctx.save_for_backward(hidden, weight, columns, largest + log_sums, kept)
        ctx.shard, ctx.chunk_size = shard, chunk_size
        return log_sums - (of_label - largest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, log_sums, kept = ctx.saved_tensors
        shard, of_losses = ctx.shard, gradients[0].contiguous()
        words = weight[: shard.count]
        of_hidden = torch.zeros_like(hidden)
        # In fp32 where chunks are added up: half precision would round after each.
        several = len(hidden) > ctx.chunk_size
        of_weight = torch.zeros_like(weight, dtype=torch.float32 if several else None)
        for chunk in chunks_of(len(hidden), ctx.chunk_size, shard):
            of_logits = hidden[chunk] @ words.t() if kept is None else kept
            logit_gradient[len(of_logits), triton.cdiv(shard.count, WORDS_AT_ONCE)](
                *(of_logits, columns[chunk], log_sums[chunk], of_losses[chunk]),
                *(of_logits.stride(0), shard.count, WORDS_AT_ONCE),
            )
            torch.mm(of_logits, words, out=of_hidden[chunk])
            own = of_weight[: shard.count]
            if own.dtype == of_logits.dtype:
                own.addmm_(of_logits.t(), hidden[chunk])
            else:
                own.add_(of_logits.t() @ hidden[chunk])
            del of_logits
        if kept is not None:
            # Triton does not tell autograd that it wrote there: a second backward pass must not take it for logits.
            torch.autograd.graph.increment_version(kept)
        if shard.group is not None and shard.reduces_hidden and len(hidden):
            torch.distributed.all_reduce(of_hidden, group=shard.group)
        return of_hidden, of_weight.to(weight.dtype), None, None, None
