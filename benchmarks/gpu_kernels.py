"""Checks, products and the head with its loss for benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import gpu_timing as timing
import torch
from torch import Tensor

from megatron_xmtf.kernels.bias_dropout_add import choose_bias_dropout_add
from megatron_xmtf.kernels.bias_dropout_add import reference as sum_reference
from megatron_xmtf.kernels.head_loss import VocabularyShard, choose_head_loss
from megatron_xmtf.kernels.head_loss import reference as head_reference
from megatron_xmtf.kernels.packed_attention import choose_packed_attention
from megatron_xmtf.kernels.packed_attention import reference as packed_reference
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes, packed_bias
from megatron_xmtf.kernels.relative_attention import choose_relative_attention
from megatron_xmtf.kernels.relative_attention import reference as relative_reference


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Return the output and the gradient of each input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def compare(
    kernel: str, ours: Any, plain: Any, inputs: list[Tensor], names: list[str], mask: Any = 1
) -> Iterator[dict[str, Any]]:
    """Hold one kernel to float64, beside plain torch in the precision of its inputs; mask: 0 on padding."""
    cotangent = torch.randn_like(plain(*inputs), dtype=torch.float32).to(timing.HALF) * mask
    found = gradients(ours, inputs, cotangent)
    other = gradients(plain, inputs, cotangent)
    exact = gradients(plain, [tensor.double() for tensor in inputs], cotangent)
    for side in (found, other, exact):
        side[0] = side[0] * mask
    for what, *three in zip(["output", *names], found, other, exact, strict=True):
        yield timing.error_row(kernel, what, *three)


def checks(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Check every kernel: prime lengths, one-token segments, padding, head_dim that is no power of two, prefix-LM."""
    generator = timing.fresh_generator()
    yield {"note": f"Seed {generator.initial_seed()}. Errors are norms, in parts of the exact one's."}
    length, heads = (67, 1) if smoke else (1021, 4)
    segment_ids = timing.packed_rows(2, length, mean=8 if smoke else 90, generator=generator)
    real = (segment_ids.t() > 0)[:, :, None]
    starts = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    place = torch.arange(length, device=timing.DEVICE).expand_as(segment_ids)
    begin = place.where(starts, torch.zeros_like(place)).cummax(dim=1).values
    prefix = (place - begin < 5) & (segment_ids > 0)  # the first five tokens of each segment are inputs
    for head_dim in (16,) if smoke else (64, 80, 96, 128):
        slopes = alibi_slopes(heads).to(timing.DEVICE)
        qkv = [timing.draw(length, 2, heads, head_dim, generator=generator) for _ in range(3)]
        for kind, mask in {"causal": None, "prefix-LM": prefix}.items():
            chosen = choose_packed_attention("fused", precision="bf16")
            prepared = chosen.prepare(segment_ids, slopes, mask)

            def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = mask, slopes: Tensor = slopes) -> Tensor:
                wide = torch.promote_types(q.dtype, torch.float32)
                return packed_reference.packed_attention(q, k, v, packed_bias(segment_ids, slopes.to(wide), mask))

            def ours(q: Tensor, k: Tensor, v: Tensor, chosen: Any = chosen, prepared: Any = prepared) -> Tensor:
                context: Tensor = chosen.attend(q, k, v, prepared)
                return context

            yield from compare(f"packed attention, {kind}, {head_dim}", ours, plain, qkv, ["dq", "dk", "dv"], real)
    yield from check_relative(segment_ids, generator, smoke=smoke)
    yield from check_head(generator, smoke=smoke)
    yield from check_bias_dropout_add(generator, smoke=smoke)


def check_bias_dropout_add(generator: torch.Generator, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Check what a layer adds to its residual, without dropout, which draws other numbers than torch's."""
    shape = (7, 2, 67) if smoke else (509, 2, 4099)
    inputs = [timing.draw(*size, generator=generator) for size in (shape, shape[-1:], shape)]
    names = ["d x", "d bias", "d residual"]
    add = choose_bias_dropout_add("fused")
    yield from compare(
        "bias, dropout and residual",
        lambda x, bias, residual: add(x, bias, residual, dropout=0.0),
        lambda x, bias, residual: sum_reference.bias_dropout_add(x, bias, residual, dropout=0.0),
        inputs,
        names,
    )


def check_relative(segment_ids: Tensor, generator: torch.Generator, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Check encoder, decoder and cross attention, the gradient of the bias among the rest."""
    chosen = choose_relative_attention("fused")
    keys = timing.packed_rows(2, segment_ids.size(1) + 30, mean=8 if smoke else 120, generator=generator)
    for kind, key_ids, causal in (
        ("encoder", segment_ids, False),
        ("decoder", segment_ids, True),
        ("cross", keys, False),
    ):
        heads, head_dim, longest = 1 if smoke else 4, 16 if smoke else 64, max(segment_ids.size(1), key_ids.size(1))
        sizes = (segment_ids.size(1), key_ids.size(1), key_ids.size(1))
        inputs = [timing.draw(size, 2, heads, head_dim, generator=generator) for size in sizes]
        inputs[0] *= 0.3
        bias = torch.randn(heads, 2 * longest - 1, generator=generator).to(timing.DEVICE)
        names = ["dq", "dk", "dv"] if kind == "cross" else ["dq", "dk", "dv", "dbias"]
        prepared = chosen.prepare(segment_ids, key_ids, causal=causal)
        dense = relative_reference.find_dense_segments(segment_ids, key_ids, causal=causal)

        def ours(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None, prepared: Any = prepared) -> Tensor:
            context: Tensor = chosen.attend(q, k, v, b, prepared, scale=1.0)
            return context

        def plain(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None, dense: Any = dense) -> Tensor:
            return relative_reference.relative_attention(q, k, v, b, dense, scale=1.0)

        given = inputs if kind == "cross" else [*inputs, bias]
        yield from compare(f"relative attention, {kind}", ours, plain, given, names)


def check_head(generator: torch.Generator, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Check the loss over a vocabulary of a prime size, in chunks."""
    words, hidden_size, count = (5_003, 16, 9) if smoke else (250_681, 1024, 257)
    inputs = [timing.draw(size, hidden_size, generator=generator) for size in (count, words)]
    inputs[1] *= 0.05
    labels = torch.randint(0, words, (count,), generator=generator).to(timing.DEVICE)
    shard = VocabularyShard(first=0, count=words)
    loss = choose_head_loss("fused")
    yield from compare(
        "head and loss",
        lambda hidden, weight: loss(hidden, weight, labels, shard=shard, logits_at_once=words * 100),
        lambda hidden, weight: head_reference.head_loss(hidden, weight, labels),
        inputs,
        ["d hidden", "d weight"],
    )


def products(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Time the matrix products of one layer and of the head, bf16."""
    tokens = 64 if smoke else 8192
    for model, hidden in ({"toy": 32} if smoke else {"560m": 1024, "1b7": 2048, "3b": 2560, "7b1": 4096}).items():
        for what, columns in (("qkv", 3), ("projection", 1), ("to 4h", 4), ("head", 250_880 / hidden)):
            width = 512 if smoke else round(columns * hidden)
            left = torch.randn(tokens, hidden, device=timing.DEVICE).to(timing.HALF)
            right = torch.randn(width, hidden, device=timing.DEVICE).to(timing.HALF)
            count = tokens if what != "head" else tokens // 4
            taken = timing.milliseconds(lambda a=left[:count], b=right: a @ b.t())
            rate = 2.0 * count * hidden * width / taken / 1e9
            yield {"model": model, "product": what, "tokens": count, "ms": taken, "TFLOP/s": rate}


def head(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Time loss and gradients over BLOOM's vocabulary at the target positions of 8,192 tokens, a fifth of them."""
    words, hidden_size, count = (1_003, 16, 9) if smoke else (250_880, 2048, 1638)
    note = f"{count} positions, hidden size {hidden_size}, {words} words; GiB: beyond the weight, with its gradient."
    yield {"note": f"{note} d hidden, d weight: norm of the difference from plain, in parts of plain's."}
    generator = timing.fresh_generator()
    hidden = timing.draw(count, hidden_size, generator=generator).requires_grad_()
    weight = (timing.draw(words, hidden_size, generator=generator) * 0.02).requires_grad_()
    labels = torch.randint(0, words, (count,), generator=generator).to(timing.DEVICE)
    exact: list[Tensor] = []
    for side, function in head_sides(hidden, weight, labels).items():
        if isinstance(function, str):
            yield {"side": side, "remark": function}
            continue

        def both(function: Callable[[], Tensor] = function) -> None:
            hidden.grad = weight.grad = None
            function().backward()

        try:
            both()
            found = [gradient for gradient in (hidden.grad, weight.grad) if gradient is not None]
            exact = exact or [gradient.clone() for gradient in found]
            off = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(found, exact, strict=True)]
            del found
            taken = timing.milliseconds(both)
            hidden.grad = weight.grad = None
            memory = timing.peak_gib(both)
        except Exception as error:  # a peer that fails in its own way must not take the others with it; said in its row
            remark = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            yield {"side": side, "remark": remark, **({"holds": False} if side in OWN_HEADS else {})}
            continue
        rate = 6.0 * count * hidden_size * words / taken / 1e9
        row = {"side": side, "ms": taken, "GiB": memory, "TFLOP/s": rate, "d hidden": off[0], "d weight": off[1]}
        # Both sides round to half precision, bf16 by up to 0.4 %.
        yield {**row, **({"holds": max(off) < 0.02} if side in OWN_HEADS else {})}


OWN_HEADS = ("plain", "fused", "chunked")


def head_sides(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor] | str]:
    """Return what computes the mean loss, the plain one first; a string is why one does not run."""
    shard = VocabularyShard(first=0, count=len(weight))
    fused, chunked = choose_head_loss("fused"), choose_head_loss("chunked")
    sides: dict[str, Callable[[], Tensor] | str] = {
        "plain": lambda: head_reference.head_loss(hidden, weight, labels).mean(),
        "fused": lambda: fused(hidden, weight, labels, shard=shard).mean(),
        "chunked": lambda: chunked(hidden, weight, labels, shard=shard).mean(),
        "Liger": "not installed (pip install liger-kernel)",
        "Apple's": "not installed (pip install cut-cross-entropy)",
    }
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        sides["Liger"] = lambda: liger(weight, hidden, labels)
    if find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        # By default it leaves small gradients out; without a threshold it computes what the others do.
        sides["Apple's"] = lambda: linear_cross_entropy(hidden, weight, labels)
        sides["Apple's, nothing left out"] = lambda: linear_cross_entropy(hidden, weight, labels, filter_eps=None)
    return sides


if __name__ == "__main__":
    timing.run({"checks": checks, "products": products, "head": head})
