"""Attention for benchmarks/gpu.py: packed rows with ALiBi and with T5's bias, beside what else there is.

fused, reference      ours and plain torch over the whole row, from slices of a fused projection, as in a model
FlexAttention         the same mask and ALiBi, compiled, its block mask made once
flash-attn-4          the same, through FlexAttention's backend of that name, if it is installed
SDPA, dense bias      torch's attention with mask and ALiBi of the whole row in bf16, which rounds the bias
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
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes, packed_bias
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
    tolerance: float = 0.02
    """Of "difference"; both round to half precision, bf16 by up to 0.4 %."""


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
    sides = relative_sides(qkv, segment_ids, has_flex=not smoke)
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
            row |= {"difference": float(difference), "holds": float(difference) < side.tolerance}
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
    sides["SDPA, dense bias"] = dense_side(qkv, packed_bias(segment_ids, slopes))
    sides["FlexAttention"] = flex_side(qkv, segment_ids, slopes) if has_flex else "not asked for here"
    has_cute = find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
    sides["flash-attn-4"] = "not installed (pip install --pre flash-attn-4)" if has_flex else "not asked for here"
    if has_flex and has_cute:
        sides["flash-attn-4"] = flex_side(qkv, segment_ids, slopes, kernel_options={"BACKEND": "FLASH"})
    counts = segment_ids.flatten().bincount()
    is_equal = int(counts[0]) == 0 and bool((counts[1:] == counts[1]).all())
    sides["flash SDPA, no ALiBi"] = equal_side(qkv, segment_ids) if is_equal else "segments are not equal"
    # flash-attn-4 alone makes a package of that name too.
    has_flash = find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None
    missing = "not installed (pip install flash-attn --no-build-isolation)"
    sides["flash-attn varlen"] = varlen_side(qkv, segment_ids, slopes) if has_flash else missing
    return sides


def dense_side(qkv: Tensor, bias: Tensor) -> Side:
    """Return torch's attention with the bias [b, n, s, s] of the whole row, in half precision."""
    dense = bias.to(qkv.dtype)

    def attend(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*x.unbind(0), attn_mask=dense)

    given = qkv.permute(3, 1, 2, 0, 4).contiguous()  # [3, b, n, s, d]
    return Side(attend, given, lambda context: context.permute(2, 0, 1, 3).flatten(2), tolerance=0.1)


def flex_side(qkv: Tensor, segment_ids: Tensor, slopes: Tensor, kernel_options: dict[str, Any] | None = None) -> Side:
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
        lambda x: compiled(*x.unbind(0), score_mod=bias, block_mask=block_mask, kernel_options=kernel_options),
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
    bias = drawn_bias(qkv, segment_ids.size(1))
    return Side(lambda x: attend(*x.unbind(3), bias, prepared, scale=1.0), qkv * 0.5, lambda context: context)


def relative_sides(qkv: Tensor, segment_ids: Tensor, *, has_flex: bool) -> dict[str, Side | str]:
    """Return the sides of an encoder's attention, whose bias gets a gradient."""
    sides: dict[str, Side | str] = {side: relative_side(side, qkv, segment_ids) for side in ("fused", "reference")}
    sides["FlexAttention"] = relative_flex_side(qkv, segment_ids) if has_flex else "not asked for here"
    return sides


def relative_flex_side(qkv: Tensor, segment_ids: Tensor) -> Side:
    """Return FlexAttention with the same bias, looked up by distance, whose gradient it adds up with atomics."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, length = segment_ids.shape
    table = drawn_bias(qkv, length)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return segment_ids[b, q] == segment_ids[b, k]

    def bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table[h, length - 1 + k - q]

    torch._dynamo.reset()
    block_mask = create_block_mask(mask, rows, None, length, length, device=segment_ids.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Side(
        lambda x: compiled(*x.unbind(0), score_mod=bias, block_mask=block_mask, scale=1.0),
        (qkv * 0.5).permute(3, 1, 2, 0, 4).contiguous(),
        lambda context: context.permute(2, 0, 1, 3).flatten(2),
    )


def drawn_bias(qkv: Tensor, length: int) -> Tensor:
    """Return a bias by distance, fp32 [n, 2 length - 1], the same for every side."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(qkv.size(2), 2 * length - 1, generator=generator).to(qkv.device).requires_grad_()


if __name__ == "__main__":
    timing.run({"attention": attention})
