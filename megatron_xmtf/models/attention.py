"""Megatron-Core's core-attention seam, filled with the packed ALiBi attention that was chosen at start."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_xmtf.kernels.packed_attention import PackedAttention

__all__ = ["PackedCoreAttention"]


class PackedCoreAttention(nn.Module):
    """Attention between projections: query, key, value [s, b, heads / tp, head_dim] -> [s, b, hidden / tp].

    `attention_bias` [b, heads / tp, s, s] holds ALiBi and the segment mask; it is made once a forward pass, for all
    layers, by `BloomModel`. It needs no gradient, so that recomputation may close over it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention: PackedAttention,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = config.attention_dropout
        self.is_forked_already = config.sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Tensor,
        attn_mask_type: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend within segments; see `kernels.packed_attention.reference`."""
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 or self.is_forked_already:
            # Under sequence parallelism Megatron-Core forks the generator around the whole block; forked once more
            # inside, hidden and attention dropout would draw the same numbers, and recomputation other ones.
            return self.attention(query, key, value, attention_bias, dropout=dropout)
        # Heads differ between tensor-parallel ranks, so must their dropout masks.
        with get_cuda_rng_tracker().fork():
            return self.attention(query, key, value, attention_bias, dropout=dropout)
