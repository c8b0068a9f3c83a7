"""Two packed rows, what is attended with in them, and attention as the model calls it, for the tests of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_xmtf.kernels.packed_attention.choose import IMPLEMENTATIONS

__all__ = ["HEADS", "HEAD_DIM", "PREFIXES", "PREFIX_MASK", "REAL", "SEGMENT_IDS", "attend", "random_qkv", "worst"]

SEGMENT_IDS = torch.tensor(
    [
        [1] * 5 + [2] * 1 + [3] * 9 + [0] * 5,
        [1] * 20,
    ]
)
"""[b, s]: a row with a segment of one token and padding, and a full one."""
PREFIX_MASK = torch.tensor(
    [
        [True] * 3 + [False] * 2 + [False] + [True] * 4 + [False] * 5 + [False] * 5,
        [True] * 19 + [False],
    ]
)
"""[b, s], of prefix-LM: inputs of some examples, one of which has none, and one a single target."""
HEADS, HEAD_DIM = 3, 8
PREFIXES = pytest.mark.parametrize("prefix_mask", [None, PREFIX_MASK], ids=["causal", "prefix-LM"])
REAL = SEGMENT_IDS.t() > 0
"""[s, b]: not padding, of which `segments` computes nothing."""


def random_qkv(dtype: torch.dtype, *, seed: int = 0, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key, value [s, b, n, d]; drawn in float64, so that every precision gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    batch, sequence = SEGMENT_IDS.shape
    shape = (3, sequence, batch, heads, HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.float32).to(dtype)
    return query, key, value


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_ids: Tensor,
    slopes: Tensor,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Run an implementation as the model does: prepare once, then attend."""
    chosen = IMPLEMENTATIONS[name]
    return chosen.attend(query, key, value, chosen.prepare(segment_ids, slopes, prefix_mask))


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).abs().max())
