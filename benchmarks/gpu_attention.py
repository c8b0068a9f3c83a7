"""Attention for benchmarks/gpu.py: packed rows with ALiBi and with T5's bias, beside what else there is.

FlexAttention         the same mask and ALiBi, compiled, its block mask made once
flash SDPA            torch's flash attention on equal segments as a batch of their own, causal, without ALiBi
flash-attn            varlen with ALiBi slopes, if it is installed
dense                 plain torch over the whole row
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import gpu_timing as timing
import torch
from torch import Tensor

from megatron_xmtf.kernels.packed_attention import choose_packed_attention
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes
from megatron_xmtf.kernels.relative_attention import choose_relative_attention
from megatron_xmtf.kernels.relative_attention import reference as relative_reference


def attention(name: str, *, smoke: bool) -> dict[str, Any]:
    """Time attention of one layer, forward alone and with its backward pass."""
    generator = timing.fresh_generator()
    rows, length = (1, 96) if smoke else (4, 2048)
    found: list[dict[str, Any]] = []
    shapes = {"560m": (16, 64), "3b": (32, 80), "7b1": (32, 128)}
    for model, (heads, head_dim) in ({"toy": (1, 16)} if smoke else shapes).items():
        patterns = {
            "segments of about 200": timing.packed_rows(rows, length, mean=200, generator=generator),
            "segments of 512": timing.equal_rows(rows, length, min(512, length)),
            "one segment": timing.equal_rows(rows, length, length),
        }
        for pattern, segment_ids in list(patterns.items())[: 2 if smoke else None]:
            qkv = timing.draw(length, rows, heads, 3, head_dim, generator=generator)
            pairs = timing.visible_pairs(segment_ids) * heads
            # Each of its compilations takes some ten seconds: two shapes, two patterns.
            has_flex = not smoke and model != "3b" and pattern != "segments of 512"
            for side, function in packed_sides(qkv, segment_ids, pattern, has_flex=has_flex).items():
                found.append({"model": model, "rows": pattern, **timed(side, function, qkv, pairs, head_dim)})
    heads = 1 if smoke else 16
    segment_ids = timing.packed_rows(rows, min(length, 1024), mean=200, generator=generator)
    qkv = timing.draw(segment_ids.size(1), rows, heads, 3, 16 if smoke else 64, generator=generator)
    for side in ("fused", "reference"):
        row = timed(side, relative_side(side, qkv, segment_ids), qkv, 0, 64)
        found.append({"model": "mT5", "rows": f"encoder, bias with gradient, {segment_ids.size(1)}", **row})
    return {"rows": found, "seed": generator.initial_seed(), "note": "TFLOP/s of the pairs that are seen, alone."}


def timed(
    side: str, function: Callable[[Tensor], Tensor] | str, qkv: Tensor, pairs: int, head_dim: int
) -> dict[str, Any]:
    """Time forward, and forward with backward; a string is why a side does not run."""
    if isinstance(function, str):
        return {"side": side, "remark": function}
    inputs = qkv.clone().requires_grad_()
    try:
        cotangent = torch.randn_like(function(inputs))

        def both() -> None:
            inputs.grad = None
            function(inputs).backward(cotangent)

        with torch.no_grad():
            forward_ms = timing.milliseconds(lambda: function(inputs))
        both_ms = timing.milliseconds(both)
        memory = timing.peak_gib(both)
    except (RuntimeError, NotImplementedError) as error:
        return {"side": side, "remark": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    flops = 4.0 * head_dim * pairs
    rates = {"TFLOP/s": 3.5 * flops / both_ms / 1e9} if pairs else {}
    return {"side": side, "forward ms": forward_ms, "both ms": both_ms, **rates, "GiB": memory}


def packed_sides(
    qkv: Tensor, segment_ids: Tensor, pattern: str, *, has_flex: bool
) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """Return the sides: each takes qkv [s, b, n, 3, d]."""
    slopes = alibi_slopes(qkv.size(2)).to(qkv.device)
    sides: dict[str, Callable[[Tensor], Tensor] | str] = {}
    for name in ("fused", "reference"):
        chosen = choose_packed_attention(name, precision="bf16")  # type: ignore[arg-type]
        prepared = chosen.prepare(segment_ids, slopes)
        sides[name] = lambda x, chosen=chosen, prepared=prepared: chosen.attend(*x.unbind(3), prepared)  # type: ignore[misc]
    sides["FlexAttention"] = flex_side(segment_ids, slopes) if has_flex else "not asked for here"
    sides["flash SDPA, no ALiBi"] = "segments are not equal" if "about" in pattern else equal_side(segment_ids)
    has_flash = find_spec("flash_attn") is not None
    sides["flash-attn varlen"] = varlen_side(segment_ids, slopes) if has_flash else "not installed"
    return sides


def flex_side(segment_ids: Tensor, slopes: Tensor) -> Callable[[Tensor], Tensor]:
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

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = (part.permute(1, 2, 0, 3) for part in qkv.unbind(3))
        return compiled(query, key, value, score_mod=bias, block_mask=block_mask).permute(2, 0, 1, 3).flatten(2)

    return attend


def equal_side(segment_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Return torch's own attention with equal segments as rows of their own."""
    segment = int((segment_ids[0] == 1).sum())

    def attend(qkv: Tensor) -> Tensor:
        length, rows, heads, _, head_dim = qkv.shape
        parts = qkv.view(length // segment, segment, rows, heads, 3, head_dim).permute(4, 0, 2, 3, 1, 5).flatten(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)

    return attend


def varlen_side(segment_ids: Tensor, slopes: Tensor) -> Callable[[Tensor], Tensor]:
    """Return flash-attn over the segments, padding counted as one more of each row."""
    from flash_attn import flash_attn_varlen_func

    counts = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in segment_ids])
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    longest = int(counts.max())

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = (part.transpose(0, 1).flatten(0, 1) for part in qkv.unbind(3))
        return flash_attn_varlen_func(query, key, value, ends, ends, longest, longest, causal=True, alibi_slopes=slopes)

    return attend


def relative_side(name: str, qkv: Tensor, segment_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Return an encoder's attention with a bias that gets a gradient."""
    if name == "fused":
        chosen = choose_relative_attention("fused")
        prepare, attend = chosen.prepare, chosen.attend
    else:
        prepare, attend = relative_reference.find_dense_segments, relative_reference.relative_attention
    prepared = prepare(segment_ids, segment_ids, causal=False)
    bias = torch.zeros(qkv.size(2), 2 * segment_ids.size(1) - 1, device=qkv.device, requires_grad=True)
    return lambda x: attend(*x.unbind(3), bias, prepared, scale=1.0)


if __name__ == "__main__":
    timing.run({"attention": attention})
