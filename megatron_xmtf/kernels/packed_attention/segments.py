"""Packed ALiBi attention on a CPU, one segment at a time: time and memory follow its length, not the row's.

    row of 8      1 1 1 | 2 2 | 0 0 0      segments of 3 and 2, padding of 3
    computed      3 x 3   2 x 2   -        the dense bias has 8 x 8 scores for each head; padding gets zeros

    A segment longer than QUERY_BLOCK is cut into blocks of queries; each sees the keys up to its own end, so that
    nearly half of the causal square is never computed. Block [2, 4) of a segment, QUERY_BLOCK = 2, slope 1:

    key           0    1    2    3
    query 2      -2   -1    0  -inf        the bias is a function of key - query alone: every block of every segment
    query 3      -3   -2   -1    0         takes its own from one table, [n, QUERY_BLOCK, longest segment]

Prefix-LM: the queries of a segment's inputs are cut into blocks by themselves, and each sees all of the inputs; those
of its targets go on as above. Block [2, 4) of 5 inputs takes its bias from a second table, which has later keys too,
from column first - 2 on, `first` being where the last block of the longest inputs begins, here 4:

    key - query of row 0    -4  -3  -2  -1   0   1   2   3   4        [n, QUERY_BLOCK, first + longest inputs]
    block [2, 4)                    -2  -1   0   1   2                row 1 is one less

torch's CPU kernel keeps scores, softmax and an fp32 bias in fp32 whatever the precision of the query, and computes
probabilities again in the backward pass instead of keeping them (`test_packed_attention_precision.py` holds both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["QUERY_BLOCK", "BiasTables", "Block", "Row", "find_segments", "packed_attention"]

QUERY_BLOCK = 256
"""Queries of one call. Forward and backward of one segment of 2,048 with 8 heads of 64, fp32, one core of an EPYC with
AVX-512: 284 ms with 64, 257 with 128, 240 with 256, 248 with 512, 373 in one piece; three segments of about 700: 96,
96, 103, 121, 140."""


class Block(NamedTuple):
    """Some queries of one segment, and what they see of it."""

    queries: int
    """How many; they follow those of the block before."""
    seen: int
    """Keys that are computed, from the segment's beginning on."""
    bias: Tensor
    """[1, n, queries, seen], a view of a table: ALiBi, -inf where a key is not seen."""


class Row(NamedTuple):
    """How the segments of one row are computed."""

    segments: tuple[tuple[Block, ...], ...]
    padding: int
    """Tokens of padding at the end."""


@dataclass(frozen=True)
class BiasTables:
    """ALiBi of every distance that occurs, for blocks to take their own from."""

    causal: Tensor
    """[n, queries, longest]: of the last `queries` queries of the longest segment, -inf where a key is later."""
    prefix: Tensor
    """[n, queries, first + longest prefix]: between inputs, see the module's docstring."""
    first: int
    """Column of the second table whose distance is 0 in row 0."""

    @classmethod
    def build(cls, slopes: Tensor, *, longest: int, longest_prefix: int) -> BiasTables:
        """Make the tables for segments and prefixes of at most these lengths; slopes: fp32 [n]."""
        queries = min(longest, QUERY_BLOCK)
        # [query, key], key - query: the last query is the longest segment's last token.
        distance = torch.arange(longest) - torch.arange(longest - queries, longest)[:, None]
        causal = (slopes[:, None, None] * distance).masked_fill_(distance > 0, float("-inf"))
        first = (longest_prefix - 1) // queries * queries if longest_prefix else 0
        distance = torch.arange(-first, longest_prefix) - torch.arange(queries)[:, None]
        return cls(causal, slopes[:, None, None] * distance, first)

    def blocks(self, length: int, prefix: int) -> tuple[Block, ...]:
        """Cut a segment of `length` tokens, of which all see the first `prefix`, into blocks."""
        most, longest = self.causal.shape[1:]
        found = []
        for begin in range(0, prefix, most):
            queries, column = min(most, prefix - begin), self.first - begin
            found.append(Block(queries, prefix, self.prefix[None, :, :queries, column : column + prefix]))
        for begin in range(prefix, length, most):
            end = min(begin + most, length)
            # Queries [begin, end), keys [0, end): distances as in the table's last rows and columns.
            found.append(Block(end - begin, end, self.causal[None, :, most - (end - begin) :, longest - end :]))
        return tuple(found)


def find_segments(segment_ids: Tensor, slopes: Tensor, prefix_mask: Tensor | None = None) -> tuple[Row, ...]:
    """Find the segments of each row, cut them into blocks, and make the tables of their bias, for all layers.

    Args:    segment_ids: int [b, s]; segments are runs, padding (0) stands at the end. slopes: fp32 [n], this rank's.
             prefix_mask: bool [b, s], what begins a segment and is seen by all of it; None: attention is causal.
    """
    lengths = [_lengths(row) for row in segment_ids]
    prefixes = [[0] * len(row) for row in lengths]
    if prefix_mask is not None:
        prefixes = list(map(_prefix_lengths, prefix_mask, lengths))
    tables = BiasTables.build(
        slopes,
        longest=max(length for row in lengths for length in (*row[:-1], 1)),
        longest_prefix=max(length for row in prefixes for length in row),
    )
    return tuple(
        Row(tuple(map(tables.blocks, row[:-1], prefix[:-1])), row[-1])
        for row, prefix in zip(lengths, prefixes, strict=True)
    )


def _lengths(segment_ids: Tensor) -> tuple[int, ...]:
    """Return the lengths of a row's segments and of its padding: 1 1 1 2 2 0 0 0 -> 3 2 3."""
    found, counts = torch.unique_consecutive(segment_ids, return_counts=True)
    ids, lengths = found.tolist(), counts.tolist()
    assert len(set(ids)) == len(ids) and 0 not in ids[:-1], f"segments are runs, padding is at the end: {ids}"
    return tuple(lengths) if ids[-1] == 0 else (*lengths, 0)


def _prefix_lengths(prefix_mask: Tensor, lengths: Sequence[int]) -> list[int]:
    """Return the lengths of the prefixes of a row's segments and padding: 1 1 0 | 0 0 | 1 1 | 0 -> 2 0 2 0."""
    marked = [part.tolist() for part in prefix_mask.split(list(lengths))]
    prefixes = [sum(part) for part in marked]
    assert all(all(part[:prefix]) for part, prefix in zip(marked, prefixes, strict=True)), (
        f"the prefix of a segment begins it: {marked}"
    )
    assert prefixes[-1] == 0, "padding has no prefix"
    return prefixes


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: Sequence[Row], *, dropout: float = 0.0
) -> Tensor:
    """Attend; the result is that of `reference.packed_attention`, but for padding, which gets zeros.

    Args:    query, key, value: [s, b, n, d], this rank's heads. pattern: of `find_segments`. dropout: of probabilities.
    Returns: [s, b, n * d], dtype of `query`.
    """
    rows = zip(_rows(query), _rows(key), _rows(value), pattern, strict=True)
    contexts = [_attend_row(*row, dropout) for row in rows]
    joined = contexts[0].unsqueeze(1) if len(contexts) == 1 else torch.stack(contexts, dim=1)
    return joined.flatten(2)


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    """Part [s, b, n, d] into rows [s, n, d]; a single one without the copy that the backward pass of unbind makes."""
    return (tensor.squeeze(1),) if tensor.size(1) == 1 else tensor.unbind(1)


def _attend_row(query: Tensor, key: Tensor, value: Tensor, row: Row, dropout: float) -> Tensor:
    """Attend within each segment of one row: [s, n, d] each -> [s, n, d]."""
    lengths = [sum(block.queries for block in segment) for segment in row.segments] + [row.padding]
    *queries, q_padding = query.split([block.queries for segment in row.segments for block in segment] + [row.padding])
    *keys, k_padding = key.split(lengths)
    *values, v_padding = value.split(lengths)
    contexts, of_block = [], iter(queries)
    for k_lnd, v_lnd, segment in zip(keys, values, row.segments, strict=True):
        ends = [block.seen for block in segment]
        for block, k_seen, v_seen in zip(segment, _prefixes(k_lnd, ends), _prefixes(v_lnd, ends), strict=True):
            q_1nld, k_1nld, v_1nld = (tensor.transpose(0, 1)[None] for tensor in (next(of_block), k_seen, v_seen))
            context_1nld = torch.nn.functional.scaled_dot_product_attention(
                q_1nld, k_1nld, v_1nld, attn_mask=block.bias, dropout_p=dropout
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
