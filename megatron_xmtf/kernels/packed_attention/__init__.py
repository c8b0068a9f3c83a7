"""Causal attention within the segments of packed rows, with ALiBi: `reference` in plain torch, `sdpa` of torch."""

from megatron_xmtf.kernels.packed_attention.choose import PackedAttention, choose_packed_attention

__all__ = ["PackedAttention", "choose_packed_attention"]
