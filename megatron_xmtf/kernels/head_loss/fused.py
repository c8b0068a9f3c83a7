"""The head and its loss as in `chunked`, with all that is done to logits in two Triton kernels.

    logits of a chunk [c, w], in the precision of hidden, as the matrix product leaves them
    `logit_statistics`    reads them once:            largest, sum of exp(logit - largest), that of the label
    `logit_gradient`      turns them into gradients   (softmax - onehot(label)) * gradient of the loss, in their place

Plain torch goes over them several times: 28 bytes a logit in the forward pass and 36 in the backward pass
(`planning/chunk_time.py` lists them), where these kernels move 2 and 4. For 2,048 positions, 250,880 words and bf16
that is 30 GB less a micro-batch, 8 ms of an H200's memory beside 10 ms of products at h = 2,048 and 600 TFLOP/s.
Computed, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xmtf.kernels.head_loss.chunked import LogitOperations, VocabularyShard, apply_head_loss

__all__ = ["head_loss", "logit_gradient", "logit_statistics"]

WORDS_AT_ONCE = 4096
"""Words that one step of a kernel takes: 32 a thread of 4 warps."""


def head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, shard: VocabularyShard, logits_at_once: int | None = None
) -> Tensor:
    """Return the cross-entropy of each position, fp32 [n]; arguments as those of `chunked.head_loss`."""
    return apply_head_loss(hidden, weight, labels, shard=shard, logits_at_once=logits_at_once, operations=TRITON)


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


def _statistics(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `LogitOperations`."""
    largest, sums, of_label = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device).unbind()
    logit_statistics[(len(logits),)](
        *(logits, columns, largest, sums, of_label),
        *(logits.stride(0), logits.size(1), WORDS_AT_ONCE),
    )
    return largest, sums, of_label


def _turn_into_gradient(logits: Tensor, columns: Tensor, log_sums: Tensor, of_losses: Tensor) -> None:
    """See `LogitOperations`."""
    logit_gradient[len(logits), triton.cdiv(logits.size(1), WORDS_AT_ONCE)](
        *(logits, columns, log_sums, of_losses),
        *(logits.stride(0), logits.size(1), WORDS_AT_ONCE),
    )
    # Triton does not tell autograd that it wrote there: a second backward pass must not take it for logits.
    torch.autograd.graph.increment_version(logits)


TRITON = LogitOperations(statistics=_statistics, turn_into_gradient=_turn_into_gradient)
