"""Attention in which each query sees a range of keys: the Triton kernels behind packed and relative attention."""

from megatron_xmtf.kernels.segment_attention.visible import VisibleRanges, cross_ranges, self_ranges

__all__ = ["VisibleRanges", "cross_ranges", "self_ranges"]
