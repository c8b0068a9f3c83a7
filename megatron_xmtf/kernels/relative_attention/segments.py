"""Packed attention of an encoder-decoder on a CPU, one segment at a time, with the gradient of the learned bias.

    encoder row   1 1 1 | 2 2 | 0         decoder row   1 1 | 2 2 | 0
    encoder       3 x 3   2 x 2           cross         2 x 3   2 x 2         scores computed; padding gets zeros

torch's fused attention gives no gradient of a bias, and its plain one keeps all scores of the row. Here a segment is
cut into blocks of QUERY_BLOCK queries. The bias of a block depends on key - query alone, so it is a slice of the row of
2 L - 1 distances, read along its diagonals: windows of as many entries as there are keys, the last query's first.

    block of queries 1 2 of a segment of 4 keys      by distance   -2 -1  0  1  2      5 entries
    query 2      -2 -1  0  1     first window
    query 1      -1  0  1  2     second window

Its gradient adds up the diagonals of the scores' gradient, back into those entries. Scores, softmax and all gradients
are in fp32 whatever the precision. Dropout's masks are drawn again in the backward pass, from a seed of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SegmentRuns", "find_segment_runs", "relative_attention"]

QUERY_BLOCK = 256
"""Queries of one block: with 8 heads and 1,024 keys its fp32 scores are 8 MiB."""


@dataclass(frozen=True)
class SegmentRuns:
    """Where the segments of a micro-batch lie; the same for every layer."""

    runs: tuple[tuple[int, slice, slice], ...]
    """Of each segment with queries and keys: the row, the queries' places in it, the keys'."""
    causal: bool
    longest: int
    """Tokens of the longest segment, at least 1."""


def find_segment_runs(queries: Tensor, keys: Tensor, *, causal: bool) -> SegmentRuns:
    """Find the runs of equal segment ids: int64 [b, q] and [b, k], 0 is padding; causal: keys are the queries."""
    runs = []
    for row, (of_queries, of_keys) in enumerate(zip(queries, keys, strict=True)):
        places = _places(of_keys)
        runs += [(row, place, places[number]) for number, place in _places(of_queries).items() if number in places]
    longest = max([1, *(max(q.stop - q.start, k.stop - k.start) for _, q, k in runs)])
    return SegmentRuns(runs=tuple(runs), causal=causal, longest=longest)


def _places(segment_ids: Tensor) -> dict[int, slice]:
    """Return the place of each segment of a row: 1 1 1 2 2 0 -> {1: 0:3, 2: 3:5}."""
    found, counts = torch.unique_consecutive(segment_ids, return_counts=True)
    places: dict[int, slice] = {}
    begin = 0
    for number, count in zip(found.tolist(), counts.tolist(), strict=True):
        assert number not in places, f"segment {number} stands at two places of a row"
        if number:
            places[number] = slice(begin, begin + count)
        begin += count
    return places


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    segments: SegmentRuns,
    *,
    scale: float,
    dropout: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """Attend; shapes and meaning as in `reference.relative_attention`."""
    seed = int(torch.randint(1 << 62, ())) if dropout > 0.0 else 0
    context: Tensor = _SegmentAttention.apply(query, key, value, bias, segments, scale, dropout, seed, recompute)
    return context


@dataclass(frozen=True)
class _Block:
    """Some queries of one segment, and the keys that any of them sees."""

    row: int
    queries: slice
    keys: slice
    first: int
    """Place of the first query in its segment."""
    hidden: int | None
    """Of a causal block: the diagonal from which on keys are later than their query; None: all keys are seen."""

    @property
    def distances(self) -> tuple[int, int]:
        """Smallest distance key - query, and how many there are."""
        queries, keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return 1 - self.first - queries, queries + keys - 1


def _blocks(segments: SegmentRuns) -> Iterator[_Block]:
    for row, queries, keys in segments.runs:
        for begin in range(queries.start, queries.stop, QUERY_BLOCK):
            end, first = min(begin + QUERY_BLOCK, queries.stop), begin - queries.start
            seen = slice(keys.start, end) if segments.causal else keys
            yield _Block(row, slice(begin, end), seen, first, first + 1 if segments.causal else None)


class _SegmentAttention(torch.autograd.Function):
    """Forward and backward of `relative_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        segments: SegmentRuns,
        scale: float,
        dropout: float,
        seed: int,
        recompute: bool,
    ) -> Tensor:
        ctx.segments, ctx.scale, ctx.dropout, ctx.seed = segments, scale, dropout, seed
        ctx.probabilities = [] if not recompute and any(ctx.needs_input_grad) else None
        context = torch.zeros(query.shape, dtype=query.dtype)
        generator = torch.Generator().manual_seed(seed)
        for block in _blocks(segments):
            probabilities = _probabilities(query, key, bias, block, scale)
            if ctx.probabilities is not None:
                ctx.probabilities.append(probabilities)
            dropped = probabilities
            if dropout > 0.0:
                dropped = probabilities * _keep(probabilities, dropout, generator)
            context[block.queries, block.row] = (dropped @ _part(value, block.keys, block.row)).transpose(0, 1)
        ctx.save_for_backward(query, key, value, bias)
        return context.flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors
        of_context = gradients[0].reshape(query.shape)
        of_query, of_key, of_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (query, key, value))
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        generator = torch.Generator().manual_seed(ctx.seed)
        for number, block in enumerate(_blocks(ctx.segments)):
            if ctx.probabilities is None:
                probabilities = _probabilities(query, key, bias, block, ctx.scale)
            else:
                probabilities, ctx.probabilities[number] = ctx.probabilities[number], None
            own = _part(of_context, block.queries, block.row)
            of_scores = own @ _part(value, block.keys, block.row).transpose(1, 2)
            dropped = probabilities
            if ctx.dropout > 0.0:
                keep = _keep(probabilities, ctx.dropout, generator)
                dropped, of_scores = probabilities * keep, of_scores * keep
            of_value[block.keys, block.row] += (dropped.transpose(1, 2) @ own).transpose(0, 1)
            of_scores = torch._softmax_backward_data(of_scores, probabilities, -1, torch.float32)
            if of_bias is not None:
                _add_diagonals(of_bias, of_scores, block)
            of_query[block.queries, block.row] = (of_scores @ _part(key, block.keys, block.row)).transpose(0, 1)
            of_key[block.keys, block.row] += (
                of_scores.transpose(1, 2) @ _part(query, block.queries, block.row)
            ).transpose(0, 1)
        ctx.probabilities = None
        of_query, of_key = (t.mul_(ctx.scale) if ctx.scale != 1.0 else t for t in (of_query, of_key))
        narrow = (t.to(value.dtype) for t in (of_query, of_key, of_value))
        return (*narrow, None if of_bias is None else of_bias.to(bias.dtype), None, None, None, None, None)


def _part(tensor: Tensor, places: slice, row: int) -> Tensor:
    """Return a segment's part, fp32 [n, length, d], of [sequence, b, n, d]."""
    return tensor[places, row].transpose(0, 1).float()


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, block: _Block, scale: float) -> Tensor:
    """Return softmax of a block's scores, fp32 [n, queries, keys]."""
    q_nqd, k_ndk = _part(query, block.queries, block.row), _part(key, block.keys, block.row).transpose(1, 2)
    if bias is None:
        scores = torch.bmm(q_nqd, k_ndk)
        if scale != 1.0:
            scores *= scale
    else:
        scores = _bias(bias, block).baddbmm_(q_nqd, k_ndk, alpha=scale)
    if block.hidden is not None:
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu_(block.hidden)
        scores.masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)


def _bias(bias: Tensor, block: _Block) -> Tensor:
    """Return a block's bias [n, queries, keys], a copy, out of [n, 2 L - 1]; see the module's docstring."""
    smallest, count = block.distances
    begin = (bias.size(1) - 1) // 2 + smallest
    windows = bias[:, begin : begin + count].float().unfold(1, block.keys.stop - block.keys.start, 1)
    return windows.flip(1)


def _add_diagonals(of_bias: Tensor, of_scores: Tensor, block: _Block) -> None:
    """Add the diagonals of [n, queries, keys] to the entries of [n, 2 L - 1] that `_bias` read.

    scores       a b c     behind 2 - 1    0 a b c     read in rows    0 a b c 0          sums  d  a+e  b+f  c
    2 queries    d e f     zeros           0 d e f     one longer      d e f . .
    """
    smallest, count = block.distances
    heads, queries, _ = of_scores.shape
    padded = of_scores.new_zeros(heads, queries * (count + 1))
    padded[:, : queries * count].view(heads, queries, count)[:, :, queries - 1 :] = of_scores
    begin = (of_bias.size(1) - 1) // 2 + smallest
    of_bias[:, begin : begin + count] += padded.view(heads, queries, count + 1).sum(1)[:, :count]


def _keep(probabilities: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Draw what probabilities are multiplied by: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    kept = torch.empty_like(probabilities).bernoulli_(1.0 - dropout, generator=generator)
    return kept.div_(1.0 - dropout)
