"""Packed attention of an encoder-decoder, readable and dense: the oracle of every other implementation.

Legend:  b micro-batch, n heads of this tensor-parallel rank, q and k queries and keys of a row, d head_dim.

    encoder segment_ids   1  1  1  2  2  0        decoder segment_ids   1  1  2  2  0
    encoder               a token sees all of its segment
    decoder               a token sees what is not after it in its segment
    cross                 a decoder token of segment 2 sees encoder tokens 3 and 4 alone

A token that sees nothing (padding, or a decoder segment without encoder tokens) gets zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DenseSegments", "find_dense_segments", "relative_attention"]


@dataclass(frozen=True)
class DenseSegments:
    """Who sees whom in a micro-batch; the same for every layer."""

    visible: Tensor
    """bool [b, q, k]."""
    longest: int
    """Tokens of the longest segment that a bias is needed for; here the whole row."""


def find_dense_segments(queries: Tensor, keys: Tensor, *, causal: bool) -> DenseSegments:
    """Compare segments: int64 [b, q] and [b, k], 0 is padding; causal: keys after their query are not seen."""
    visible = (queries[:, :, None] == keys[:, None, :]) & (queries > 0)[:, :, None]
    if causal:
        visible = visible.tril()
    return DenseSegments(visible=visible, longest=max(queries.size(1), keys.size(1)))


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    segments: DenseSegments,
    *,
    scale: float,
    dropout: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """Attend with scores and softmax in fp32 (in fp64 for fp64 inputs, the oracle of tests).

    Args:    query: [q, b, n, d]. key, value: [k, b, n, d], this rank's heads.
             bias: [n, 2 L - 1], `buckets.bias_by_distance`; None: none. scale: of scores, 1 for T5.
             dropout: of probabilities. recompute: compute probabilities again in the backward pass, keep none.
    Returns: [q, b, n * d], dtype of `query`.
    """
    arguments = (query, key, value, bias, segments.visible, scale, dropout)
    if recompute and torch.is_grad_enabled():
        context = torch.utils.checkpoint.checkpoint(_attend, *arguments, use_reentrant=False)
    else:
        context = _attend(*arguments)
    assert isinstance(context, Tensor)
    return context


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor, scale: float, dropout: float
) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("qbnd,kbnd->bnqk", query.to(wide), key.to(wide)) * scale
    if bias is not None:
        longest = (bias.size(1) + 1) // 2
        place = torch.arange(scores.size(-1), device=scores.device)
        distance = place[None, :] - place[: scores.size(-2), None]  # [q, k], key - query
        scores = scores + bias.to(wide)[:, distance + longest - 1]
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    # A query that sees nothing has a row of -inf alone, whose softmax is no number.
    probabilities = torch.softmax(scores.masked_fill(~visible.any(-1)[:, None, :, None], 0.0), dim=-1)
    probabilities = probabilities.masked_fill(~visible[:, None], 0.0)
    if dropout > 0.0:
        probabilities = torch.dropout(probabilities, dropout, train=True)
    return torch.einsum("bnqk,kbnd->qbnd", probabilities.to(value.dtype), value).flatten(2)
