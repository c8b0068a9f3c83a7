"""Ranges of keys: the worked example, and every pattern against the dense masks of the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_xmtf.kernels.packed_attention.reference import packed_bias
from megatron_xmtf.kernels.relative_attention.reference import find_dense_segments
from megatron_xmtf.kernels.segment_attention import VisibleRanges, cross_ranges, self_ranges

ROW = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
PREFIX = torch.tensor([[1, 1, 0, 0, 1, 0, 0]], dtype=torch.bool)


def test_the_worked_example() -> None:
    causal = self_ranges(ROW, causal=True)
    assert causal.key_begin.tolist() == [[0, 0, 0, 0, 4, 4, 7]]
    assert causal.key_end.tolist() == [[1, 2, 3, 4, 5, 6, 0]]
    assert causal.query_begin.tolist() == [[0, 1, 2, 3, 4, 5, 7]]
    assert causal.query_end.tolist() == [[4, 4, 4, 4, 6, 6, 0]]
    assert self_ranges(ROW, causal=True, prefix_mask=PREFIX).key_end.tolist() == [[2, 2, 3, 4, 5, 6, 0]]
    assert self_ranges(ROW, causal=False).key_end.tolist() == [[4, 4, 4, 4, 6, 6, 0]]
    cross = cross_ranges(torch.tensor([[1, 2, 2, 0]]), ROW)
    assert (cross.key_begin.tolist(), cross.key_end.tolist()) == ([[0, 4, 4, 7]], [[4, 6, 6, 0]])


def random_rows(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """Return segment ids [3, length], some numbers left out, and a mask of what begins each segment."""
    generator = torch.Generator().manual_seed(seed)
    rows, prefixes = [], []
    for _ in range(3):
        ids, prefix = [], []
        number = 0
        while len(ids) < length:
            number += int(torch.randint(1, 3, (), generator=generator))
            size = int(torch.randint(1, 9, (), generator=generator))
            inputs = int(torch.randint(0, size + 1, (), generator=generator))
            ids += [number] * size
            prefix += [True] * inputs + [False] * (size - inputs)
        padding = int(torch.randint(0, 6, (), generator=generator))
        kept = length - padding
        rows.append(torch.tensor(ids[:kept] + [0] * padding))
        prefixes.append(torch.tensor(prefix[:kept] + [False] * padding))
    return torch.stack(rows), torch.stack(prefixes)


def dense(ranges: VisibleRanges) -> Tensor:
    """Return bool [b, q, k] of ranges."""
    key = torch.arange(ranges.query_begin.size(1))
    return (key >= ranges.key_begin[:, :, None]) & (key < ranges.key_end[:, :, None])


@pytest.mark.parametrize("pattern", ["causal", "prefix", "bidirectional", "cross"])
def test_ranges_are_the_masks_of_the_references(pattern: str) -> None:
    for seed in range(40):
        queries, prefix = random_rows(seed, 37)
        keys = random_rows(seed + 1000, 53)[0] if pattern == "cross" else queries
        if pattern == "prefix":
            bias = packed_bias(queries, torch.zeros(1), prefix)[:, 0]
            wanted = (bias == 0) & (queries > 0)[:, :, None]
        else:
            wanted = find_dense_segments(queries, keys, causal=pattern == "causal").visible
        if pattern == "cross":
            ranges = cross_ranges(queries, keys)
        else:
            given = prefix if pattern == "prefix" else None
            ranges = self_ranges(queries, causal=pattern != "bidirectional", prefix_mask=given)
        assert torch.equal(dense(ranges), wanted)
        query = torch.arange(queries.size(1))[:, None]
        within = (query >= ranges.query_begin[:, None]) & (query < ranges.query_end[:, None])
        assert bool((within | ~wanted).all()), "a query that sees a key is one of those visited for it"
        assert all(bound.dtype == torch.int32 and bound.is_contiguous() for bound in vars(ranges).values())


@pytest.mark.parametrize("row", [[1, 2, 1], [0, 1, 1]])
def test_a_row_that_is_not_packed_is_refused(row: list[int]) -> None:
    with pytest.raises(RuntimeError, match="segments of a packed row rise"):
        self_ranges(torch.tensor([row]), causal=True)
