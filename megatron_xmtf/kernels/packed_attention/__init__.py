"""Causal attention within the segments of packed rows, with ALiBi: dense or by segment."""

from megatron_xmtf.kernels.packed_attention.choose import PackedAttention, choose_packed_attention

__all__ = ["PackedAttention", "choose_packed_attention"]
