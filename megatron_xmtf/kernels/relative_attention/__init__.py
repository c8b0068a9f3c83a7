"""Attention of encoder-decoders within the segments of packed rows, with T5's learned bias: dense or by segment."""

from megatron_xmtf.kernels.relative_attention.choose import RelativeAttention, choose_relative_attention

__all__ = ["RelativeAttention", "choose_relative_attention"]
