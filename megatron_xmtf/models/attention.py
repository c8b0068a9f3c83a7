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

    `attention_bias` is what the kernel's `prepare` made of the segments, by `BloomModel`, once a forward pass for all
    layers: a dense bias, or the places of the segments. Megatron-Core hands it through as it is. It needs no gradient,
    so that recomputation may close over it.
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
        self.attend = attention.attend
        self.dropout = config.attention_dropout
        self.is_forked_already = config.sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Any,
        attn_mask_type: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend within segments; see `kernels.packed_attention.reference`."""
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 or self.is_forked_already:
            # Under sequence parallelism Megatron-Core forks the generator around the whole block; forked once more
            # inside, hidden and attention dropout would draw the same numbers, and recomputation other ones.
            return self.attend(query, key, value, attention_bias, dropout=dropout)
        # Heads differ between tensor-parallel ranks, so must their dropout masks.
        with get_cuda_rng_tracker().fork():
            return self.attend(query, key, value, attention_bias, dropout=dropout)
