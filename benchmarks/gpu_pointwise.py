"""Norms, activations and sums for benchmarks/gpu.py: torch, compiled, and every library that is installed.

torch           as the models run it where nothing else is chosen
torch.compile   the same, compiled at this shape
Megatron-Core   its compiled functions: what `kernels.activation` chooses on a GPU, and its bias-dropout-add
ours            what `kernels.bias_dropout_add` chooses on a GPU
Liger, Transformer Engine, apex     where they are installed and have the operation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import gpu_timing as timing
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from torch import Tensor

from megatron_xmtf.kernels.bias_dropout_add import choose_bias_dropout_add
from megatron_xmtf.kernels.bias_dropout_add import reference as sum_reference

Operation = Callable[[Tensor], Tensor]


def pointwise(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Time forward and backward, in GB/s of what must be read and written at least."""
    tokens, hidden = (32, 64) if smoke else (8192, 4096)
    draws = Draws(tokens, hidden)
    for what, sides in operations(draws).items():
        given = draws.wide if what == "gated GELU" else draws.x
        for side, operation in sides.items():
            try:
                cotangent = torch.randn_like(operation(given))
                taken = timing.milliseconds(lambda op=operation, x=given, dy=cotangent: draws.both(op, x, dy))
            except Exception as error:  # a peer that fails in its own way must not take the others with it; said so
                remark = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                yield {"operation": what, "side": side, "remark": remark}
                continue
            # Forward reads x and writes y; backward reads x and dy and writes dx. Of a sum: reads x and residual and
            # writes y; backward reads dy for the bias, and writes dx where that is another.
            moved = given.numel() * (4 if what.startswith("bias + dropout 0 ") else 5)
            if what == "gated GELU":
                moved = 3 * given.numel() + 2 * cotangent.numel()
            yield {"operation": what, "side": side, "ms": taken, "GB/s": 2 * moved / taken / 1e6}


class Draws:
    """Inputs, the same for every side."""

    def __init__(self, tokens: int, hidden: int) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=timing.DEVICE).to(timing.HALF).requires_grad_()

        self.hidden = hidden
        self.x, self.wide, self.residual = draw(tokens, hidden), draw(tokens, 2 * hidden), draw(tokens, hidden)
        self.weight, self.shift = draw(hidden), draw(hidden)

    def both(self, operation: Operation, given: Tensor, cotangent: Tensor) -> None:
        """Run forward and backward."""
        for leaf in (self.x, self.wide, self.residual, self.weight, self.shift):
            leaf.grad = None
        operation(given).backward(cotangent)


def operations(draws: Draws) -> dict[str, dict[str, Operation]]:
    """Return the sides of each operation, torch first."""
    functional, hidden, weight, shift = torch.nn.functional, draws.hidden, draws.weight, draws.shift

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up

    def summed(rate: float) -> Operation:
        return lambda x: sum_reference.bias_dropout_add(x, shift, draws.residual, dropout=rate)

    found: dict[str, dict[str, Operation]] = {
        "LayerNorm": {"torch": lambda x: functional.layer_norm(x, (hidden,), weight, shift)},
        "RMSNorm": {"torch": lambda x: functional.rms_norm(x, (hidden,), weight, 1e-6)},
        "bias + tanh-GELU": {"torch": lambda x: functional.gelu(x + shift, approximate="tanh")},
        "gated GELU": {"torch": gated},
        "bias + dropout 0 + residual": {"torch": summed(0.0)},
        "bias + dropout 0.1 + residual": {"torch": summed(0.1)},
    }
    if timing.DEVICE == "cuda":
        for sides in found.values():
            sides["torch.compile"] = torch.compile(sides["torch"], dynamic=False)
        found["bias + tanh-GELU"]["Megatron-Core"] = lambda x: bias_gelu_impl(x, shift)
        found["gated GELU"]["Megatron-Core"] = lambda x: bias_geglu_impl(x, None)
    compiled, ours = get_bias_dropout_add(True, True), choose_bias_dropout_add("fused")
    for rate in (0.0, 0.1):
        sides = found[f"bias + dropout {rate:g} + residual"]
        sides["ours"] = lambda x, rate=rate: ours(x, shift, draws.residual, dropout=rate)  # type: ignore[misc]
        if timing.DEVICE == "cuda":
            sides["Megatron-Core"] = lambda x, rate=rate: compiled((x, shift), draws.residual, rate)  # type: ignore[misc]
    for what, library, operation in installed(draws):
        found[what][library] = operation
    return found


def installed(draws: Draws) -> Iterator[tuple[str, str, Operation]]:
    """Yield operation, library and function of what is installed."""
    hidden, weight, shift = draws.hidden, draws.weight, draws.shift
    if find_spec("liger_kernel") is not None:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        yield "LayerNorm", "Liger", lambda x: LigerLayerNormFunction.apply(x, weight, shift, 1e-5)
        yield "RMSNorm", "Liger", lambda x: LigerRMSNormFunction.apply(x, weight, 1e-6)
        yield "gated GELU", "Liger", lambda x: LigerGELUMulFunction.apply(*(p.contiguous() for p in x.chunk(2, dim=-1)))
    if timing.DEVICE != "cuda":
        return
    if find_spec("transformer_engine") is not None:
        from transformer_engine import pytorch as te

        settings: dict[str, Any] = {"eps": 1e-5, "params_dtype": timing.HALF, "device": timing.DEVICE}
        yield "LayerNorm", "Transformer Engine", te.LayerNorm(hidden, **settings)
        yield "RMSNorm", "Transformer Engine", te.RMSNorm(hidden, **settings)
    if find_spec("apex") is not None and find_spec("apex.normalization") is not None:
        from apex.normalization import FusedLayerNorm, FusedRMSNorm

        yield "LayerNorm", "apex", FusedLayerNorm(hidden).to(timing.DEVICE, timing.HALF)
        yield "RMSNorm", "apex", FusedRMSNorm(hidden).to(timing.DEVICE, timing.HALF)


if __name__ == "__main__":
    timing.run({"pointwise": pointwise})
