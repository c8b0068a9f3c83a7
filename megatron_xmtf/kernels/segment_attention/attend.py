"""Launch the kernels of attention over ranges, forward and backward: memory, strides, autograd.

    query [q, b, n, d], key, value [k, b, n, d]  ->  context [q, b, n * d]

Inputs are read where they lie: only the last dimension must be contiguous, as in the slices that Megatron-Core cuts of
a fused projection. Kept for the backward pass are inputs, context and one fp32 number a query and head; neither scores
nor probabilities nor dropout's masks are ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron_xmtf.kernels.segment_attention.available import LARGEST_HEAD_DIM
from megatron_xmtf.kernels.segment_attention.backward import bias_gradient, key_value_gradient, query_gradient
from megatron_xmtf.kernels.segment_attention.blocks import Bias, Blocks, BlocksByKernel, choose_blocks
from megatron_xmtf.kernels.segment_attention.forward import BIAS_PADDING, attention_forward
from megatron_xmtf.kernels.segment_attention.visible import VisibleRanges

__all__ = ["attend_ranges"]


def attend_ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: VisibleRanges,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    bias_by_distance: Tensor | None = None,
    dropout: float = 0.0,
    blocks: BlocksByKernel | None = None,
) -> Tensor:
    """Attend; a query that sees nothing gets zeros.

    Args:    query: [q, b, n, d]. key, value: [k, b, n, d]; fp32, bf16 or fp16, this rank's heads.
             alibi_slopes: fp32 [n]. bias_by_distance: [n, 2 L - 1], column L - 1 + (key - query); it gets a gradient.
             dropout: of probabilities; its seed is drawn from the default generator of the device.
             blocks: other cuts than those of `blocks.py`, to be measured or tested.
    Returns: [q, b, n * d], dtype of `query`.
    """
    assert query.size(-1) <= LARGEST_HEAD_DIM, f"head_dim {query.size(-1)} is above {LARGEST_HEAD_DIM}"
    assert query.dtype in (torch.float32, torch.bfloat16, torch.float16), query.dtype
    seed = torch.randint(1 << 62, (1,), device=query.device) if dropout > 0.0 else None
    bias = alibi_slopes if bias_by_distance is None else bias_by_distance
    kind: Bias = "none" if bias is None else "alibi" if bias_by_distance is None else "relative"
    context: Tensor = _RangeAttention.apply(query, key, value, bias, ranges, kind, scale, dropout, seed, blocks or {})
    return context.flatten(2)


class _RangeAttention(torch.autograd.Function):
    """Forward and backward of `attend_ranges`; context is [q, b, n, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        ranges: VisibleRanges,
        kind: Bias,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        given: BlocksByKernel,
    ) -> Tensor:
        query, key, value = (_with_contiguous_rows(tensor) for tensor in (query, key, value))
        call = _Call(query, key, value, bias, ranges, kind, scale, dropout, seed, given)
        sequence, batch, heads, _ = query.shape
        context = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_sum = torch.empty(batch, heads, sequence, dtype=torch.float32, device=query.device)
        blocks = call.blocks("attention_forward")
        attention_forward[triton.cdiv(sequence, blocks.queries), heads, batch](
            *(query, key, value, context, log_sum, ranges.key_begin, ranges.key_end, call.bias, call.seed),
            *(*_strides(query), *_strides(key), *_strides(value), *_strides(context)),
            *call.numbers,
            **call.constants(blocks),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            BIAS=kind,
        )
        ctx.save_for_backward(query, key, value, bias, seed, context, log_sum)
        ctx.ranges, ctx.kind, ctx.scale, ctx.dropout, ctx.given = ranges, kind, scale, dropout, given
        return context

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, seed, context, log_sum = ctx.saved_tensors
        of_context = _with_contiguous_rows(gradients[0])
        call = _Call(query, key, value, bias, ctx.ranges, ctx.kind, ctx.scale, ctx.dropout, seed, ctx.given)
        delta = torch.empty_like(log_sum)
        of_query = call.query_gradient(context, of_context, log_sum, delta)
        of_key, of_value = call.key_value_gradient(of_context, log_sum, delta)
        of_bias = None
        if ctx.kind == "relative" and ctx.needs_input_grad[3]:
            of_bias = call.bias_gradient(of_context, log_sum, delta).to(bias.dtype)
        return of_query, of_key, of_value, of_bias, None, None, None, None, None, None


class _Call:
    """One attention: what all of its kernels are given."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        ranges: VisibleRanges,
        kind: Bias,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        given: BlocksByKernel,
    ) -> None:
        self.query, self.key, self.value, self.ranges, self.kind = query, key, value, ranges, kind
        # A kernel that does not read them is given something that it could.
        self.bias = query if bias is None else bias.float().contiguous()
        self.seed = ranges.key_begin if seed is None else seed
        self.longest = 1
        if kind == "relative":
            self.longest = (self.bias.size(1) + 1) // 2
            assert self.longest >= max(query.size(0), key.size(0)), "the bias has every distance of the row"
            self.bias = torch.nn.functional.pad(self.bias, (0, BIAS_PADDING.value))
        self.numbers = (query.size(0), key.size(0), self.longest, scale, dropout)
        self.drops, self.given = dropout > 0.0, given

    def blocks(self, kernel: str) -> Blocks:
        if kernel in self.given:
            return self.given[kernel]
        return choose_blocks(kernel, self.query.dtype, _block_d(self.query), self.kind, drops=self.drops)

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        """Return what is compiled into every kernel."""
        return {
            "HEAD_DIM": self.query.size(-1),
            "BLOCK_D": _block_d(self.query),
            "DROPS": self.drops,
            # fp32 products would otherwise be rounded to TF32, which has 10 bits.
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
            "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages,
        }

    def query_gradient(self, context: Tensor, of_context: Tensor, log_sum: Tensor, delta: Tensor) -> Tensor:
        """Return dq, and write delta."""
        query, key, value, ranges = self.query, self.key, self.value, self.ranges
        of_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        blocks = self.blocks("query_gradient")
        query_gradient[triton.cdiv(query.size(0), blocks.queries), query.size(2), query.size(1)](
            *(query, key, value, context, of_context, of_query, log_sum, delta),
            *(ranges.key_begin, ranges.key_end, self.bias, self.seed),
            *(*_strides(query), *_strides(key), *_strides(value)),
            *(*_strides(context), *_strides(of_context), *_strides(of_query)),
            *self.numbers,
            **self.constants(blocks),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            BIAS=self.kind,
        )
        return of_query

    def key_value_gradient(self, of_context: Tensor, log_sum: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return dk and dv."""
        query, key, value, ranges = self.query, self.key, self.value, self.ranges
        of_key, of_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
        blocks = self.blocks("key_value_gradient")
        key_value_gradient[triton.cdiv(key.size(0), blocks.keys), key.size(2), key.size(1)](
            *(query, key, value, of_context, of_key, of_value, log_sum, delta),
            *(ranges.key_begin, ranges.key_end, ranges.query_begin, ranges.query_end, self.bias, self.seed),
            *(*_strides(query), *_strides(key), *_strides(value)),
            *(*_strides(of_context), *_strides(of_key), *_strides(of_value)),
            *self.numbers,
            **self.constants(blocks),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            BIAS=self.kind,
        )
        return of_key, of_value

    def bias_gradient(self, of_context: Tensor, log_sum: Tensor, delta: Tensor) -> Tensor:
        """Return the gradient of the bias by distance, fp32 [n, 2 L - 1]."""
        query, key, value, ranges = self.query, self.key, self.value, self.ranges
        blocks = self.blocks("bias_gradient")
        size = blocks.queries
        query_blocks, key_blocks = triton.cdiv(query.size(0), size), triton.cdiv(key.size(0), size)
        diagonals = query_blocks + key_blocks - 1
        batch, heads = query.size(1), query.size(2)
        sums = torch.empty(batch, heads, diagonals, 2, size, dtype=torch.float32, device=query.device)
        bias_gradient[diagonals, heads, batch](
            *(query, key, value, of_context, sums, log_sum, delta),
            *(ranges.key_begin, ranges.key_end, self.bias, self.seed),
            *(*_strides(query), *_strides(key), *_strides(value), *_strides(of_context)),
            *self.numbers,
            **self.constants(blocks),
            BLOCK=size,
        )
        return _join_diagonals(sums.sum(0), first=-query_blocks * size, longest=self.longest)


def _join_diagonals(sums: Tensor, *, first: int, longest: int) -> Tensor:
    """Add up what neighbouring diagonals of blocks hold of the same distances.

    sums [n, diagonals, 2, B]     diagonal 0   -2B ... -B-1 | -B ... -1       first = -2 B, of two blocks of queries
                                  diagonal 1                | -B ... -1 | 0 ... B-1

    Returns: [n, 2 longest - 1], from distance -(longest - 1) on.
    """
    heads, diagonals, _, size = sums.shape
    by_distance = sums.new_zeros(heads, diagonals + 1, size)
    by_distance[:, :-1] = sums[:, :, 0]
    by_distance[:, 1:] += sums[:, :, 1]
    by_distance = by_distance.flatten(1)
    # Blocks reach beyond the row, where nothing is seen.
    before, after = first + longest - 1, longest - 1 - (first + by_distance.size(1) - 1)
    return torch.nn.functional.pad(by_distance, (before, after))


def _block_d(query: Tensor) -> int:
    """Return head_dim, padded to what the tensor cores take."""
    return max(16, triton.next_power_of_2(query.size(-1)))


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous: itself, but for odd strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]
