"""How the kernels of attention over ranges cut their work: the one place that they are told from.

    attention_forward     a program holds `queries` of a head and goes through the keys that they see, `keys` at a time
    query_gradient        likewise
    key_value_gradient    a program holds `keys` and goes through the queries that see them, `queries` at a time
    bias_gradient         a program goes down one diagonal of squares; both are alike

`benchmarks/gpu.py` times other cuts of BLOOM's shapes beside these; what is faster there is written here by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["BLOCKS", "DROPPING", "Bias", "Blocks", "BlocksByKernel", "choose_blocks"]

Bias = Literal["none", "alibi", "relative"]


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    """Blocks of keys (or of queries) that are under way from memory at once."""


BlocksByKernel = Mapping[str, Blocks]
"""Cuts by name of kernel, which take the place of the chosen ones."""


def choose_blocks(kernel: str, dtype: torch.dtype, block_d: int, kind: Bias, *, drops: bool) -> Blocks:
    """Return the cut of a kernel, one of `BLOCKS` or, with dropout, of `DROPPING`.

    Args:  dtype: of query, key and value. block_d: head_dim, padded to a power of two. drops: with dropout.
    """
    width = "wide" if block_d > 64 else "narrow"
    place = kernel, "fp32" if dtype.itemsize == 4 else "relative" if kind == "relative" else "half", width
    return DROPPING.get(place, BLOCKS[place]) if drops else BLOCKS[place]


BLOCKS = {
    # No register is spilled on an H100 or H200, and in half precision, where it costs no more, several blocks share a
    # multiprocessor (`tests/kernels/test_compiled.py` reads that out of the machine code). The learned bias takes
    # registers of its own. narrow: head_dim up to 64.
    ("attention_forward", "half", "narrow"): Blocks(64, 64, 4, 3),
    ("attention_forward", "half", "wide"): Blocks(128, 64, 8, 3),
    ("attention_forward", "relative", "narrow"): Blocks(128, 64, 8, 2),
    ("attention_forward", "relative", "wide"): Blocks(64, 32, 4, 2),
    ("query_gradient", "half", "narrow"): Blocks(64, 64, 4, 3),
    ("query_gradient", "half", "wide"): Blocks(128, 64, 8, 2),
    ("query_gradient", "relative", "narrow"): Blocks(64, 64, 4, 2),
    ("query_gradient", "relative", "wide"): Blocks(128, 32, 8, 2),
    ("key_value_gradient", "half", "narrow"): Blocks(64, 128, 8, 3),
    ("key_value_gradient", "half", "wide"): Blocks(32, 128, 8, 3),
    ("key_value_gradient", "relative", "narrow"): Blocks(32, 128, 8, 2),
    ("key_value_gradient", "relative", "wide"): Blocks(32, 128, 8, 2),
    ("bias_gradient", "relative", "narrow"): Blocks(64, 64, 8, 1),
    ("bias_gradient", "relative", "wide"): Blocks(64, 64, 8, 1),
    # fp32 is multiplied without tensor cores, element by element: a thread holds whole rows of what it multiplies, and
    # blocks are as small as they may be. Where two blocks are under way they pass through shared memory, not registers.
    ("attention_forward", "fp32", "narrow"): Blocks(32, 32, 8, 1),
    ("attention_forward", "fp32", "wide"): Blocks(32, 16, 8, 2),
    ("query_gradient", "fp32", "narrow"): Blocks(32, 32, 8, 1),
    ("query_gradient", "fp32", "wide"): Blocks(16, 16, 8, 2),
    ("key_value_gradient", "fp32", "narrow"): Blocks(32, 32, 8, 1),
    ("key_value_gradient", "fp32", "wide"): Blocks(16, 16, 8, 1),
    ("bias_gradient", "fp32", "narrow"): Blocks(32, 32, 8, 1),
    ("bias_gradient", "fp32", "wide"): Blocks(16, 16, 4, 1),
}

DROPPING = {
    # Where dropout's random numbers would not fit the registers beside the rest.
    ("attention_forward", "fp32", "narrow"): Blocks(32, 16, 8, 1),
    ("attention_forward", "relative", "wide"): Blocks(64, 32, 8, 2),
    ("key_value_gradient", "half", "narrow"): Blocks(32, 128, 8, 3),
}
