"""Attention for benchmarks/gpu.py: packed rows with ALiBi and with T5's bias, beside what else there is.

fused, reference      ours and plain torch over the whole row, from slices of a fused projection, as in a model
FlexAttention         the same mask and ALiBi, compiled, its block mask made once
flash SDPA            torch's flash attention on equal segments as a batch of their own, causal, without ALiBi
flash-attn            varlen with ALiBi slopes, if it is installed

A peer is given the order of dimensions that it is made for, and what it returns is timed as it is. "difference" is the
norm of its result less ours, in parts of ours, where both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import gpu_timing as timing
import torch
from torch import Tensor

from megatron_xmtf.kernels.packed_attention import choose_packed_attention
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes
from megatron_xmtf.kernels.relative_attention import choose_relative_attention
from megatron_xmtf.kernels.relative_attention import reference as relative_reference


@dataclass(frozen=True)
class Side:
    """One way to attend."""

    attend: Callable[[Tensor], Tensor]
    given: Tensor
    """Query, key and value in one tensor, of which it gets the gradient."""
    join: Callable[[Tensor], Tensor] | None = None
    """Its result as ours, [s, b, n * d]; None where it computes something else."""


def attention(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Time attention of one layer, forward alone and with its backward pass."""
    generator = timing.fresh_generator()
    yield {"note": f"Seed {generator.initial_seed()}. TFLOP/s of the pairs that are seen, alone."}
    rows, length, mean = (1, 96, 30) if smoke else (4, 2048, 200)
    shapes = {"560m": (16, 64), "3b": (32, 80), "7b1": (32, 128)}
    for model, (heads, head_dim) in ({"toy": (1, 16)} if smoke else shapes).items():
        patterns = {
            f"segments of about {mean}": timing.packed_rows(rows, length, mean=mean, generator=generator),
            f"segments of {length // 4}": timing.equal_rows(rows, length, length // 4),
            "one segment": timing.equal_rows(rows, length, length),
        }
        for pattern, segment_ids in list(patterns.items())[: 2 if smoke else None]:
            qkv = timing.draw(length, rows, heads, 3, head_dim, generator=generator)
            pairs = timing.visible_pairs(segment_ids) * heads
            # Each of its compilations takes some ten seconds: two shapes, two patterns.
            has_flex = not smoke and model != "3b" and pattern != f"segments of {length // 4}"
            sides = packed_sides(qkv, segment_ids, has_flex=has_flex)
            for row in timed_sides(sides, pairs=pairs, head_dim=head_dim, is_real=(segment_ids > 0).t()):
                yield {"model": model, "rows": pattern, **row}
    segment_ids = timing.packed_rows(rows, min(length, 1024), mean=mean, generator=generator)
    heads, head_dim = (1, 16) if smoke else (16, 64)
    qkv = timing.draw(segment_ids.size(1), rows, heads, 3, head_dim, generator=generator)
    sides = {side: relative_side(side, qkv, segment_ids) for side in ("fused", "reference")}
    for row in timed_sides(sides, pairs=0, head_dim=head_dim, is_real=(segment_ids > 0).t()):
        yield {"model": "mT5", "rows": f"encoder, bias with gradient, {segment_ids.size(1)}", **row}


def timed_sides(
    sides: dict[str, Side | str], *, pairs: int, head_dim: int, is_real: Tensor
) -> Iterator[dict[str, Any]]:
    """Time each side, the first of which is ours; a string is why one does not run."""
    ours: Tensor | None = None
    for name, side in sides.items():
        if isinstance(side, str):
            yield {"side": name, "remark": side}
            continue
        try:
            row, context = timed(side, pairs, head_dim)
        except Exception as error:  # a peer that fails in its own way must not take the others with it; said in its row
            is_own = name in ("fused", "reference")
            remark = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            yield {"side": name, "remark": remark, **({"holds": False} if is_own else {})}
            continue
        if ours is None:
            ours = context
        elif context is not None:
            assert ours is not None
            difference = (context.double() - ours.double())[is_real].norm() / ours.double()[is_real].norm()
            # Both round to half precision, bf16 by up to 0.4 %.
            row |= {"difference": float(difference), "holds": float(difference) < 0.02}
        yield {"side": name, **row}


def timed(side: Side, pairs: int, head_dim: int) -> tuple[dict[str, Any], Tensor | None]:
    """Time forward, and forward with backward; return the row and the context [s, b, n * d]."""
    given = side.given.detach().clone().requires_grad_()
    output = side.attend(given)
    cotangent = torch.randn_like(output)

    def both() -> None:
        given.grad = None
        side.attend(given).backward(cotangent)

    forward_ms, both_ms = timing.milliseconds(lambda: side.attend(given)), timing.milliseconds(both)
    row = {"forward ms": forward_ms, "both ms": both_ms}
    if pairs:
        # 4 d FLOPs a pair forward, 10 d backward: scores again, and two products for each of dv, ds; one for dq, dk.
        row["TFLOP/s"] = 14.0 * head_dim * pairs / both_ms / 1e9
    context = None if side.join is None else side.join(output.detach())
    del output
    given.grad = None
    return {**row, "GiB": timing.peak_gib(both)}, context


def packed_sides(qkv: Tensor, segment_ids: Tensor, *, has_flex: bool) -> dict[str, Side | str]:
    """Return the sides for qkv [s, b, n, 3, d]."""
    slopes = alibi_slopes(qkv.size(2)).to(qkv.device)
    sides: dict[str, Side | str] = {}
    for name in ("fused", "reference"):
        chosen = choose_packed_attention(name, precision="bf16")  # type: ignore[arg-type]
        prepared = chosen.prepare(segment_ids, slopes)
        sides[name] = Side(
            lambda x, chosen=chosen, prepared=prepared: chosen.attend(*x.unbind(3), prepared),  # type: ignore[misc]
            qkv,
            lambda context: context,
        )
    sides["FlexAttention"] = flex_side(qkv, segment_ids, slopes) if has_flex else "not asked for here"
    counts = segment_ids.flatten().bincount()
    is_equal = int(counts[0]) == 0 and bool((counts[1:] == counts[1]).all())
    sides["flash SDPA, no ALiBi"] = equal_side(qkv, segment_ids) if is_equal else "segments are not equal"
    has_flash = find_spec("flash_attn") is not None
    sides["flash-attn varlen"] = varlen_side(qkv, segment_ids, slopes) if has_flash else "not installed"
    return sides


def flex_side(qkv: Tensor, segment_ids: Tensor, slopes: Tensor) -> Side:
    """Return FlexAttention with the same mask and bias."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, length = segment_ids.shape

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (segment_ids[b, q] == segment_ids[b, k]) & (q >= k)

    def bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + slopes[h] * (k - q)

    torch._dynamo.reset()  # after eight shapes of one function it would no longer compile
    block_mask = create_block_mask(mask, rows, None, length, length, device=segment_ids.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Side(
        lambda x: compiled(*x.unbind(0), score_mod=bias, block_mask=block_mask),
        qkv.permute(3, 1, 2, 0, 4).contiguous(),  # [3, b, n, s, d]
        lambda context: context.permute(2, 0, 1, 3).flatten(2),
    )


def equal_side(qkv: Tensor, segment_ids: Tensor) -> Side:
    """Return torch's own attention with equal segments as rows of their own."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    segment = int((segment_ids[0] == 1).sum())
    length, rows, heads, _, head_dim = qkv.shape
    parts = qkv.view(length // segment, segment, rows, heads, 3, head_dim).permute(4, 0, 2, 3, 1, 5)

    def attend(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*x.unbind(0), is_causal=True)

    return Side(attend, parts.flatten(1, 2).contiguous())  # [3, segments, n, l, d]


def varlen_side(qkv: Tensor, segment_ids: Tensor, slopes: Tensor) -> Side:
    """Return flash-attn over the segments, padding counted as one more of each row."""
    from flash_attn import flash_attn_varlen_func

    counts = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in segment_ids])
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    longest, rows = int(counts.max()), segment_ids.size(0)

    def attend(x: Tensor) -> Tensor:
        query, key, value = x.unbind(1)
        return flash_attn_varlen_func(query, key, value, ends, ends, longest, longest, causal=True, alibi_slopes=slopes)

    given = qkv.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()  # [b s, 3, n, d]
    return Side(attend, given, lambda context: context.unflatten(0, (rows, -1)).transpose(0, 1).flatten(2))


def relative_side(name: str, qkv: Tensor, segment_ids: Tensor) -> Side:
    """Return an encoder's attention with a bias that gets a gradient."""
    if name == "fused":
        chosen = choose_relative_attention("fused")
        prepare, attend = chosen.prepare, chosen.attend
    else:
        prepare, attend = relative_reference.find_dense_segments, relative_reference.relative_attention
    prepared = prepare(segment_ids, segment_ids, causal=False)
    generator = torch.Generator().manual_seed(0)  # the same bias for both sides
    bias = torch.randn(qkv.size(2), 2 * segment_ids.size(1) - 1, generator=generator).to(qkv.device).requires_grad_()
    return Side(lambda x: attend(*x.unbind(3), bias, prepared, scale=1.0), qkv * 0.5, lambda context: context)


if __name__ == "__main__":
    timing.run({"attention": attention})
