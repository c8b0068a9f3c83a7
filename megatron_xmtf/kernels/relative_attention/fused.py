"""Packed attention of an encoder-decoder in Triton, with the gradient of the learned bias.

The kernels are in `kernels/segment_attention`. The bias is read by distance out of [n, 2 L - 1] numbers, and so is its
gradient written: the buckets, and the sum over all distances of a bucket, are torch's (`buckets.py`), once a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_xmtf.kernels.segment_attention import VisibleRanges, cross_ranges, self_ranges
from megatron_xmtf.kernels.segment_attention.attend import attend_ranges

__all__ = ["FusedSegments", "find_segment_ranges", "relative_attention"]


@dataclass(frozen=True)
class FusedSegments:
    """Who sees whom in a micro-batch; the same for every layer."""

    ranges: VisibleRanges
    longest: int
    """Tokens that a bias is needed for: the whole row, since its segments are known to the device alone."""


def find_segment_ranges(queries: Tensor, keys: Tensor, *, causal: bool) -> FusedSegments:
    """Find what each query sees: int64 [b, q] and [b, k], 0 is padding; causal: keys are the queries."""
    ranges = self_ranges(queries, causal=True) if causal else cross_ranges(queries, keys)
    return FusedSegments(ranges=ranges, longest=max(queries.size(1), keys.size(1)))


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    segments: FusedSegments,
    *,
    scale: float,
    dropout: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """Attend; shapes and meaning as in `reference.relative_attention`. Probabilities are always computed again."""
    return attend_ranges(query, key, value, segments.ranges, scale=scale, bias_by_distance=bias, dropout=dropout)
