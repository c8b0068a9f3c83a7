"""Packed ALiBi attention on a CPU, one segment at a time: time and memory follow its length, not the row's.

    row of 8      1 1 1 | 2 2 | 0 0 0      segments of 3 and 2, padding of 3
    computed      3 x 3   2 x 2   -        the dense bias has 8 x 8 scores for each head; padding gets zeros

    A segment longer than QUERY_BLOCK is cut into blocks of queries; each sees the keys up to its own end, so that
    nearly half of the causal square is never computed. Block [2, 4) of a segment, QUERY_BLOCK = 2, slope 1:

    key           0    1    2    3
    query 2      -2   -1    0  -inf        the bias is a function of key - query alone: every block of every segment
    query 3      -3   -2   -1    0         takes its own from one table, [n, QUERY_BLOCK, longest segment]

torch's CPU kernel keeps scores, softmax and an fp32 bias in fp32 whatever the precision of the query, and computes
probabilities again in the backward pass instead of keeping them (`test_packed_attention.py` holds both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["QUERY_BLOCK", "SegmentPattern", "find_segments", "packed_attention"]

QUERY_BLOCK = 256
"""Queries of one call. Forward and backward of one segment of 2,048 with 8 heads of 64, fp32, one core of an EPYC with
AVX-512: 284 ms with 64, 257 with 128, 240 with 256, 248 with 512, 373 in one piece; three segments of about 700: 96,
96, 103, 121, 140."""


@dataclass(frozen=True)
class SegmentPattern:
    """Where the segments of a micro-batch lie, and the bias of their scores; the same for every layer."""

    lengths: tuple[tuple[int, ...], ...]
    """Of each row: the lengths of its segments in order, then that of its padding, which may be 0."""
    bias: Tensor
    """[n, queries, longest]: ALiBi of the last `queries` queries of the longest segment, -inf where a key is later."""


def find_segments(segment_ids: Tensor, slopes: Tensor) -> SegmentPattern:
    """Find the segments of each row and make the table that the bias of any of them is a part of.

    Args:    segment_ids: int [b, s]; segments are runs, padding (0) stands at the end. slopes: fp32 [n], this rank's.
    """
    lengths = tuple(_lengths(row) for row in segment_ids)
    longest = max(length for row in lengths for length in (*row[:-1], 1))
    queries = min(longest, QUERY_BLOCK)
    # [query, key], key - query: the last query is the longest segment's last token.
    distance = torch.arange(longest) - torch.arange(longest - queries, longest)[:, None]
    bias = (slopes[:, None, None] * distance).masked_fill_(distance > 0, float("-inf"))
    return SegmentPattern(lengths=lengths, bias=bias)


def _lengths(segment_ids: Tensor) -> tuple[int, ...]:
    """Return the lengths of a row's segments and of its padding: 1 1 1 2 2 0 0 0 -> 3 2 3."""
    found, counts = torch.unique_consecutive(segment_ids, return_counts=True)
    ids, lengths = found.tolist(), counts.tolist()
    assert len(set(ids)) == len(ids) and 0 not in ids[:-1], f"segments are runs, padding is at the end: {ids}"
    return tuple(lengths) if ids[-1] == 0 else (*lengths, 0)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: SegmentPattern, *, dropout: float = 0.0
) -> Tensor:
    """Attend; the result is that of `reference.packed_attention`, but for padding, which gets zeros.

    Args:    query, key, value: [s, b, n, d], this rank's heads. dropout: of probabilities.
    Returns: [s, b, n * d], dtype of `query`.
    """
    rows = zip(_rows(query), _rows(key), _rows(value), pattern.lengths, strict=True)
    contexts = [_attend_row(*row, pattern.bias, dropout) for row in rows]
    joined = contexts[0].unsqueeze(1) if len(contexts) == 1 else torch.stack(contexts, dim=1)
    return joined.flatten(2)


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    """Part [s, b, n, d] into rows [s, n, d]; a single one without the copy that the backward pass of unbind makes."""
    return (tensor.squeeze(1),) if tensor.size(1) == 1 else tensor.unbind(1)


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], bias: Tensor, dropout: float
) -> Tensor:
    """Attend within each segment of one row: [s, n, d] each -> [s, n, d]."""
    queries, longest = bias.shape[1:]
    ends = [[min(first + queries, length) for first in range(0, length, queries)] for length in lengths[:-1]]
    sizes = [end - begin for segment in ends for begin, end in zip([0, *segment[:-1]], segment, strict=True)]
    *blocks, q_padding = query.split([*sizes, lengths[-1]])
    *keys, k_padding = key.split(lengths)
    *values, v_padding = value.split(lengths)
    contexts, block = [], iter(blocks)
    for k_lnd, v_lnd, segment in zip(keys, values, ends, strict=True):
        for end, k_seen, v_seen in zip(segment, _prefixes(k_lnd, segment), _prefixes(v_lnd, segment), strict=True):
            q_block = next(block)
            q_1nld, k_1nld, v_1nld = (tensor.transpose(0, 1)[None] for tensor in (q_block, k_seen, v_seen))
            # Queries [end - size, end), keys [0, end): distances as in the table's last rows and columns.
            context_1nld = torch.nn.functional.scaled_dot_product_attention(
                q_1nld,
                k_1nld,
                v_1nld,
                attn_mask=bias[None, :, queries - len(q_block) :, longest - end :],
                dropout_p=dropout,
            )
            contexts.append(context_1nld[0].transpose(0, 1))
    # Zeros that hang on all three: a micro-batch of padding alone must still give every weight a gradient.
    return torch.cat([*contexts, (q_padding + k_padding + v_padding) * 0])


def _prefixes(tensor: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
    """Return tensor[:end] for each end; the last is the whole."""
    if len(ends) == 1:
        return (tensor,)
    views: tuple[Tensor, ...] = _Prefixes.apply(tensor, ends)
    return views


class _Prefixes(torch.autograd.Function):
    """Slices from 0 on, whose gradients are added up in place: autograd would fill a whole tensor for each."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(tensor[:end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[-1].clone()
        for end, gradient in zip(ctx.ends[:-1], gradients[:-1], strict=True):
            total[:end] += gradient
        return total, None
