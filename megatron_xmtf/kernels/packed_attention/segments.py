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

from dataclasses import dataclass

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
    # unbind, split and cat: their backward passes are one stack or cat each; a slice's would fill a whole tensor.
    rows = zip(query.unbind(1), key.unbind(1), value.unbind(1), pattern.lengths, strict=True)
    contexts = []
    for *q_k_v, lengths in rows:
        *segments, padding = zip(*(tensor.split(lengths) for tensor in q_k_v), strict=True)
        attended = [_attend_segment(q, k, v, pattern.bias, dropout) for q, k, v in segments]
        # Zeros that hang on all three: a micro-batch of padding alone must still give every weight a gradient.
        contexts.append(torch.cat([*attended, sum(padding) * 0]))  # [s, n, d]
    return torch.stack(contexts, dim=1).flatten(2)


def _attend_segment(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """Attend causally within one segment: [length, n, d] each -> [length, n, d]."""
    q_nld, k_nld, v_nld = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    queries, longest = bias.shape[1:]
    contexts, end = [], 0
    for block in q_nld.split(queries, dim=2):
        size = block.size(2)
        end += size
        # Queries [end - size, end), keys [0, end): distances as in the table's last rows and columns.
        context = torch.nn.functional.scaled_dot_product_attention(
            block,
            k_nld if end == len(key) else k_nld[:, :, :end],
            v_nld if end == len(key) else v_nld[:, :, :end],
            attn_mask=bias[None, :, queries - size :, longest - end :],
            dropout_p=dropout,
        )
        contexts.append(context)
    return torch.cat(contexts, dim=2)[0].transpose(0, 1)
