"""Packed ALiBi attention through torch's scaled_dot_product_attention with the dense fp32 bias.

fp32 only: torch wants the bias in the dtype of the query, and ALiBi in bf16 loses integer distances above 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["packed_attention"]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Attend; shapes and meaning as in `reference.packed_attention`, fp32.

    Args:    query, key, value: fp32 [s, b, n, d]. bias: fp32 [b, n, s, s].
    Returns: fp32 [s, b, n * d].
    """
    sequence, batch, heads, head_dim = query.shape
    q_bnsd, k_bnsd, v_bnsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(
        q_bnsd, k_bnsd, v_bnsd, attn_mask=bias, dropout_p=dropout
    )
    return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * head_dim)
