"""Packed attention by segment: long segments cut into blocks of queries, and where segments and prefixes are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_xmtf.kernels.packed_attention import segments
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes
from tests.kernels.packed_rows import HEAD_DIM, HEADS, attend, worst

LONG_LENGTHS = (3, segments.QUERY_BLOCK, 1, 2 * segments.QUERY_BLOCK + 77, segments.QUERY_BLOCK + 1)
"""Segments of one block of queries and less, of one token more, and of three blocks; then padding."""


def long_row(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return segment ids [1, s] of `LONG_LENGTHS`, and query, key, value [s, 1, n, d]."""
    lengths = torch.tensor([*LONG_LENGTHS, 9])
    segment_ids = torch.repeat_interleave(torch.tensor([1, 2, 3, 4, 5, 0]), lengths)[None]
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, segment_ids.size(1), 1, HEADS, HEAD_DIM, generator=generator).to(dtype)
    return segment_ids, query, key, value


LONG_PREFIXES = (2, segments.QUERY_BLOCK, 0, segments.QUERY_BLOCK + 100, 1)
"""Inputs of the same segments: all of one that ends with its block, none, one block and part of another, one token."""


def long_prefix_mask() -> Tensor:
    """Return the prefix mask [1, s] of `long_row`."""
    inputs = [
        [True] * prefix + [False] * (length - prefix)
        for length, prefix in zip((*LONG_LENGTHS, 9), (*LONG_PREFIXES, 0), strict=True)
    ]
    return torch.tensor([sum(inputs, [])])


@pytest.mark.parametrize("prefix_mask", [None, long_prefix_mask()], ids=["causal", "prefix-LM"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"])
def test_a_segment_cut_into_blocks_of_queries_is_exact(
    dtype: torch.dtype, bound: float, prefix_mask: Tensor | None
) -> None:
    segment_ids, *q_k_v = long_row(dtype)
    real = (segment_ids.t() > 0)[:, :, None]
    slopes = alibi_slopes(HEADS)
    inputs = [tensor.clone().requires_grad_() for tensor in q_k_v]
    exact_inputs = [tensor.double().requires_grad_() for tensor in q_k_v]
    found = attend("segments", *inputs, segment_ids, slopes, prefix_mask) * real
    exact = attend("reference", *exact_inputs, segment_ids, slopes.double(), prefix_mask) * real
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, cotangent)],
        [exact, *torch.autograd.grad(exact, exact_inputs, cotangent.double())],
        strict=True,
    )
    for ours, theirs in pairs:
        assert worst(ours, theirs) < bound * float(theirs.detach().abs().max())


@pytest.mark.parametrize("prefix_mask", [None, long_prefix_mask()], ids=["causal", "prefix-LM"])
@pytest.mark.parametrize("fault", ["bias of the table's first column", "a block too short"])
def test_a_block_taken_from_the_wrong_place_is_seen(fault: str, prefix_mask: Tensor | None) -> None:
    segment_ids, query, key, value = long_row(torch.float32)
    (row,) = segments.find_segments(segment_ids, alibi_slopes(HEADS), prefix_mask)
    exact = attend("reference", query, key, value, segment_ids, alibi_slopes(HEADS), prefix_mask)
    dims = 3 if fault.startswith("bias") else 2
    broken = [
        tuple(block._replace(bias=block.bias.roll(1, dims=dims).nan_to_num(neginf=-1e9)) for block in segment)
        for segment in row.segments
    ]
    found = segments.packed_attention(query, key, value, [row._replace(segments=tuple(broken))])
    assert worst(found[:-9], exact[:-9]) > 0.01


def test_the_places_of_segments() -> None:
    rows = segments.find_segments(torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0], [1] * 8, [0] * 8]), torch.tensor([0.5]))
    assert [row.padding for row in rows] == [3, 0, 8]
    assert [[(block.queries, block.seen) for (block,) in row.segments] for row in rows] == [
        [(3, 3), (2, 2)],
        [(8, 8)],
        [],
    ]
    ((block,),) = rows[1].segments
    assert block.bias.shape == (1, 1, 8, 8) and block.bias[0, 0, 7, 3:].tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0]
    assert block.bias[0, 0, 6, 6:].tolist() == [0.0, float("-inf")]


def test_the_places_of_prefixes() -> None:
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0]])
    prefix_mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    ((first, second), padding) = segments.find_segments(segment_ids, torch.tensor([0.5]), prefix_mask)[0]
    assert padding == 3
    assert [(block.queries, block.seen) for block in (*first, *second)] == [(2, 2), (1, 3), (2, 2)]
    assert first[0].bias[0, 0].tolist() == [[0.0, 0.5], [-0.5, 0.0]]
    assert first[1].bias[0, 0].tolist() == [[-1.0, -0.5, 0.0]]
    assert second[0].bias[0, 0].tolist() == [[0.0, float("-inf")], [-0.5, 0.0]]


@pytest.mark.parametrize("marked", [[0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]])
def test_a_prefix_that_does_not_begin_its_segment_is_refused(marked: list[int]) -> None:
    with pytest.raises(AssertionError, match=r"the prefix of a segment begins it|padding has no prefix"):
        segments.find_segments(torch.tensor([[1, 1, 1, 0]]), torch.tensor([0.5]), torch.tensor([marked]).bool())


@pytest.mark.parametrize("row", [[1, 1, 2, 1], [0, 0, 1, 1]])
def test_a_segment_in_two_places_is_refused(row: list[int]) -> None:
    with pytest.raises(AssertionError, match="segments are runs, padding is at the end"):
        segments.find_segments(torch.tensor([row]), torch.tensor([0.5]))
