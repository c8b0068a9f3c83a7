"""How attention's kernels should cut their work, for benchmarks/gpu.py: other sizes of blocks beside the chosen ones.

Each cut of `CANDIDATES` takes the place of the chosen one in one kernel, at BLOOM's shapes, on packed rows of about 200
tokens a segment and on rows of one segment, which are timed apart and count alike. All of them compile for sm_90
without a spilled register (`tests/kernels/test_compiled.py`). A cut that gives another result does not hold. What is
faster than the chosen one is to be written into `kernels/segment_attention/blocks.py`, by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu_timing as timing
import torch
from torch import Tensor

from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes
from megatron_xmtf.kernels.segment_attention import self_ranges
from megatron_xmtf.kernels.segment_attention.attend import attend_ranges
from megatron_xmtf.kernels.segment_attention.blocks import Blocks, BlocksByKernel, choose_blocks

CANDIDATES = {
    # kernel and width of the heads: narrow up to 64, wide up to 128; (queries, keys, num_warps, num_stages)
    ("attention_forward", "narrow"): [
        *((64, 64, 4, 2), (64, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 2)),
        *((64, 128, 4, 3), (128, 32, 4, 3), (128, 32, 8, 3), (64, 32, 4, 4)),
    ],
    ("attention_forward", "wide"): [
        *((128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 8, 3)),
        *((128, 32, 8, 3), (64, 32, 4, 3), (64, 128, 8, 3)),
    ],
    ("query_gradient", "narrow"): [
        *((64, 64, 4, 2), (64, 64, 8, 3), (128, 64, 8, 3), (128, 32, 4, 3)),
        *((128, 128, 8, 2), (64, 128, 4, 3), (64, 32, 4, 3)),
    ],
    ("query_gradient", "wide"): [
        *((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 3), (128, 32, 8, 3)),
    ],
    ("key_value_gradient", "narrow"): [
        *((64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 3), (32, 64, 4, 3), (32, 128, 8, 3)),
    ],
    ("key_value_gradient", "wide"): [
        *((32, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 3), (16, 128, 8, 3), (16, 64, 4, 3)),
    ],
}
SHAPES = {"7b1, 1b7": (16, 128), "560m": (16, 64), "3b": (32, 80)}
"""Heads and head_dim of models; 16 of the 7B's 32 heads, as many as the 1.7B has."""
SECONDS = 85.0
"""No cut is begun after that: each takes about a second to compile."""


def blocks(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Time every cut of every kernel; the best of each kernel and shape is marked."""
    ends = time.monotonic() + SECONDS
    generator = timing.fresh_generator()
    rows, length, mean = (1, 40, 12) if smoke else (4, 2048, 200)
    patterns = [timing.packed_rows(rows, length, mean=mean, generator=generator)]
    patterns += [] if smoke else [timing.equal_rows(rows, length, length)]
    left_out = 0
    for model, (heads, head_dim) in ({"toy": (1, 16)} if smoke else SHAPES).items():
        cases = [Case(timing.draw(length, rows, heads, 3, head_dim, generator=generator), ids) for ids in patterns]
        for kernel in ("attention_forward", "query_gradient", "key_value_gradient"):
            candidates = [(16, 16, 4, 1)] if smoke else CANDIDATES[kernel, "wide" if head_dim > 64 else "narrow"]
            found, late = measured(kernel, head_dim, candidates, cases, ends=ends)
            left_out += late
            for row in found:
                yield {"model": model, "kernel": kernel, **row}
    if left_out:
        yield {"note": f"{left_out} cuts were not tried: {SECONDS:.0f} s were over."}


class Case:
    """Rows to attend in, and their exact answer under the chosen cuts."""

    def __init__(self, qkv: Tensor, segment_ids: Tensor) -> None:
        self.qkv, self.ranges = qkv, self_ranges(segment_ids, causal=True)
        self.slopes = alibi_slopes(qkv.size(2)).to(qkv.device)
        self.cotangent = torch.randn(qkv.size(0), qkv.size(1), qkv.size(2) * qkv.size(4)).to(qkv)
        self.expected = self.run({})[0]

    def run(self, cuts: BlocksByKernel) -> tuple[list[Tensor], Callable[[], Any], Callable[[], Any]]:
        """Return context and gradient, and what runs the forward and the backward pass alone."""
        leaf = self.qkv.detach().requires_grad_()
        scale = leaf.size(-1) ** -0.5

        def forward() -> Tensor:
            return attend_ranges(
                *leaf.unbind(3),
                self.ranges,
                scale=scale,
                alibi_slopes=self.slopes,
                blocks=cuts,  # type: ignore[misc]
            )

        context = forward()

        def backward() -> Tensor:
            return torch.autograd.grad(context, leaf, self.cotangent, retain_graph=True)[0]

        return [context.detach(), backward()], forward, backward


def measured(
    kernel: str, head_dim: int, candidates: list[tuple[int, int, int, int]], cases: list[Case], *, ends: float
) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each cut of a kernel, the chosen one first, and how many came too late."""
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    chosen = choose_blocks(kernel, timing.HALF, block_d, "alibi", drops=False)
    cuts = [chosen, *(cut for candidate in candidates if (cut := Blocks(*candidate)) != chosen)]
    rows, late = [], 0
    for cut in cuts:
        if cut is not chosen and time.monotonic() > ends:
            late += 1
            continue
        row: dict[str, Any] = {"queries": cut.queries, "keys": cut.keys, "warps": cut.num_warps}
        row |= {"stages": cut.num_stages, "chosen": cut is chosen or None}
        try:
            row |= time_cut({kernel: cut}, cases, is_forward=kernel == "attention_forward")
        except Exception as error:  # one that takes more of the device than there is must not end the others; said so
            row |= {"remark": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
        rows.append(row)
    right = [row for row in rows if row.get("holds")]
    best = min(right, key=lambda row: float(row["ms"]), default=None)
    for row in rows:
        if "ms" in row and "ms" in rows[0]:
            row |= {"speed, times the chosen's": rows[0]["ms"] / row["ms"], "best": row is best or None}
    return rows, late


def time_cut(cuts: BlocksByKernel, cases: list[Case], *, is_forward: bool) -> dict[str, Any]:
    """Time the pass that a kernel is part of, in all cases together; compare the result with the chosen cuts'."""
    taken, holds = 0.0, True
    for case in cases:
        found, forward, backward = case.run(cuts)
        for ours, expected in zip(found, case.expected, strict=True):
            difference = (ours.double() - expected.double()).norm() / expected.double().norm()
            # Both round to half precision, bf16 by up to 0.4 %, after sums in another order.
            holds &= bool(difference < 0.01)
        taken += timing.milliseconds(forward if is_forward else backward)
    return {"ms": taken, "holds": holds}


if __name__ == "__main__":
    timing.run({"blocks": blocks})
