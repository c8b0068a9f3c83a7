"""Packed ALiBi attention in Triton: no scores are stored, blocks between different segments are not visited.

The kernels are in `kernels/segment_attention`; what they are given is this: a causal or prefix-LM segment is one range
of keys for each query, and the bias is slope * distance, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_xmtf.kernels.segment_attention import VisibleRanges, self_ranges
from megatron_xmtf.kernels.segment_attention.attend import attend_ranges

__all__ = ["PackedRanges", "find_ranges", "packed_attention"]


@dataclass(frozen=True)
class PackedRanges:
    """Who sees whom in a micro-batch, and the bias; the same for every layer."""

    ranges: VisibleRanges
    slopes: Tensor
    """fp32 [n], this rank's heads."""


def find_ranges(segment_ids: Tensor, slopes: Tensor, prefix_mask: Tensor | None = None) -> PackedRanges:
    """Find what each query sees, without waiting for the device.

    Args:    segment_ids: int [b, s]; segments are runs in rising order, padding (0) stands at the end.
             slopes: fp32 [n], this rank's heads. prefix_mask: bool [b, s], what begins a segment and is seen by all of
             it; None: attention is causal.
    """
    return PackedRanges(self_ranges(segment_ids, causal=True, prefix_mask=prefix_mask), slopes.float())


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, prepared: PackedRanges, *, dropout: float = 0.0
) -> Tensor:
    """Attend; the result is that of `reference.packed_attention`, but for padding, which gets zeros.

    Args:    query, key, value: [s, b, n, d], fp32, bf16 or fp16, this rank's heads; slices of a fused projection are
             read where they lie. prepared: of `find_ranges`. dropout: of probabilities.
    Returns: [s, b, n * d], dtype of `query`.
    """
    scale = query.size(-1) ** -0.5
    return attend_ranges(query, key, value, prepared.ranges, scale=scale, alibi_slopes=prepared.slopes, dropout=dropout)
