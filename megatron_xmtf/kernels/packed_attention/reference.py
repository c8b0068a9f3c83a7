"""Packed ALiBi attention, readable: the oracle that every other implementation is held to.

Legend:  b micro-batch, n heads of this tensor-parallel rank, s sequence, d head_dim.

    segment_ids   1  1  1  2  2  0          query row 4 (segment 2) sees keys 3 and 4 alone;
    key visible   0  0  0  1  1  0          its bias is slope * (key - query) = -slope, 0

Prefix-LM: the inputs of an example, marked in `prefix_mask`, are seen by all of its tokens, before and after.

    segment_ids   1  1  1  1  2  2  0       query row 0 sees keys 0, 1 and 2, with bias 0, slope, 2 * slope;
    prefix_mask   1  1  1  0  1  0  0       query row 3, a target, sees 0 to 3; query row 5 sees 4 and 5
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["alibi_slopes", "packed_attention", "packed_bias"]


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the ALiBi slope of each head, fp32 [num_heads].

    A power of two: a geometric sequence from 2^(-8/n). Otherwise the slopes of the next smaller power of two, then
    every second one of the next larger power's.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    Source:  Press et al. 2022, "Train Short, Test Long", section 3; `transformers` BloomModel builds the same.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(power) + geometric(2 * power)[0::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32)


def packed_bias(segment_ids: Tensor, slopes: Tensor, prefix_mask: Tensor | None = None) -> Tensor:
    """Return what is added to the scores: ALiBi where a query sees a key, -inf elsewhere.

    A query sees the keys of its segment that are not later, and those that `prefix_mask` marks.

    The distance key - query is used, not the key's position alone as `transformers` does: softmax cannot tell them
    apart, and small numbers keep their precision deep in a long row. Positions need no reset at segment borders.
    Padding (segment 0) sees padding, so that no row is all -inf.

    Args:    segment_ids: int [b, s]. slopes: fp32 [n], this rank's heads. prefix_mask: bool [b, s], the inputs of each
             segment, which begin it, False on padding; None: none, every segment is causal.
    Returns: fp32 [b, n, s, s] (query, key).
    Source:  prefix-LM, Raffel et al. 2020, section 3.2.1; with ALiBi as Megatron-DeepSpeed has it (`prefixlm`): its
             bias slope * position of the key is the same in both directions, no distance is made positive.
    """
    sequence = segment_ids.size(1)
    position = torch.arange(sequence, device=segment_ids.device)
    distance = position[None, :] - position[:, None]  # [query, key], key - query
    alibi = slopes[:, None, None] * distance  # [n, query, key]
    seen = distance[None] <= 0  # [b or 1, query, key]
    if prefix_mask is not None:
        seen = seen | prefix_mask[:, None, :]
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & seen  # [b, query, key]
    return alibi[None].masked_fill(~visible[:, None], float("-inf"))


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Attend with scores and softmax in fp32 (in fp64 for fp64 inputs, the oracle of tests).

    Args:    query, key, value: [s, b, n, d], this rank's heads. bias: fp32 [b, n, s, s]. dropout: of probabilities.
    Returns: [s, b, n * d], dtype of `query`.
    """
    sequence, batch, heads, head_dim = query.shape
    q_bnsd, k_bnsd, v_bnsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (q_bnsd.to(wide) @ k_bnsd.to(wide).transpose(-1, -2)) * head_dim**-0.5 + bias
    probabilities = torch.softmax(scores, dim=-1)
    if dropout > 0.0:
        probabilities = torch.dropout(probabilities, dropout, train=True)
    context = probabilities.to(value.dtype) @ v_bnsd  # [b, n, s, d]
    return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * head_dim)
