"""Bias, dropout and residual: plain torch against Megatron-Core's own, the Triton kernel against torch in float64."""

from __future__ import annotations

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.bias_dropout_add import choose_bias_dropout_add, reference
from megatron_xmtf.kernels.segment_attention import available
from megatron_xmtf.models.residual import bias_dropout_add_seam
from tests.kernels.interpreter import DEVICE, correct_bf16

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("correct_bf16")
__all__ = ["correct_bf16"]

SHAPE = (5, 2, 2_051)
"""[s, b, h]: a prime number of columns, one program's share and three more."""
BIASES = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])


def draw(dtype: torch.dtype, *, has_bias: bool) -> list[Tensor]:
    """Return x, the bias if there is one, and the residual, on the device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [SHAPE, SHAPE[-1:], SHAPE] if has_bias else [SHAPE, SHAPE]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def run(function: object, inputs: list[Tensor], *, dropout: float, seed: int = 1) -> list[Tensor]:
    """Return the sum, then the gradient of each input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.manual_seed(seed)
    bias = leaves[1] if len(leaves) == 3 else None
    output = function(leaves[0], bias, leaves[-1], dropout=dropout)  # type: ignore[operator]
    cotangent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@BIASES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_bits_of_megatron_core(dtype: torch.dtype, training: bool, has_bias: bool) -> None:
    theirs = get_bias_dropout_add(training, False)
    ours = bias_dropout_add_seam(reference.bias_dropout_add)(training, False)
    found = [
        run(lambda x, bias, residual, dropout, add=add: add((x, bias), residual, dropout), inputs, dropout=0.3)
        for add, inputs in ((theirs, draw(dtype, has_bias=has_bias)), (ours, draw(dtype, has_bias=has_bias)))
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@BIASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_without_dropout(dtype: torch.dtype, has_bias: bool) -> None:
    inputs = draw(dtype, has_bias=has_bias)
    found = run(choose_bias_dropout_add("fused"), inputs, dropout=0.0)
    plain = run(reference.bias_dropout_add, inputs, dropout=0.0)
    exact = run(reference.bias_dropout_add, [tensor.double() for tensor in inputs], dropout=0.0)
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert error(ours, wanted) < 1e-6
        else:
            assert error(ours, wanted) <= 2 * error(theirs, wanted) + 1e-6


@BIASES
def test_gradients_of_the_reference_are_those_of_finite_differences(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 5), (5,), (3, 2, 5)] if has_bias else [(3, 2, 5), (3, 2, 5)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def add(x: Tensor, *others: Tensor) -> Tensor:
        torch.manual_seed(1)  # every evaluation drops the same
        return reference.bias_dropout_add(x, others[0] if has_bias else None, others[-1], dropout=0.3)

    assert torch.autograd.gradcheck(add, inputs)


def kept(output: Tensor, inputs: list[Tensor]) -> Tensor:
    """Return where dropout kept the value, out of a sum in fp32: elsewhere it is the residual itself."""
    return output != inputs[-1]


@BIASES
def test_dropout_is_the_same_in_the_backward_pass(has_bias: bool) -> None:
    inputs = draw(torch.float32, has_bias=has_bias)
    found = run(choose_bias_dropout_add("fused"), inputs, dropout=0.3)
    mask = kept(found[0], inputs).double() / 0.7
    wanted = run(
        lambda x, bias, residual, dropout: residual + mask * (x if bias is None else x + bias),
        [tensor.double() for tensor in inputs],
        dropout=0.3,
    )
    for ours, exact in zip(found, wanted, strict=True):
        assert error(ours, exact) < 1e-6


def test_dropout_drops_its_share_independently_of_column_row_and_call() -> None:
    inputs = draw(torch.float32, has_bias=True)
    add = choose_bias_dropout_add("fused")
    masks = torch.stack([kept(run(add, inputs, dropout=0.3, seed=seed)[0], inputs).cpu().double() for seed in (1, 2)])
    masks = masks.flatten(1, 2)  # [calls, rows, columns]
    # Four standard deviations of a share of 0.7, and of a correlation of independent draws.
    assert abs(float(masks.mean()) - 0.7) < 4 * (0.21 / masks.numel()) ** 0.5
    deviations = (masks - 0.7) / 0.21**0.5
    width = 512
    pairs = {
        "calls": (deviations[0], deviations[1]),
        "rows": (deviations[0, 1:], deviations[0, :-1]),
        "columns": (deviations[..., 1:], deviations[..., :-1]),
        "quarters": (deviations[..., width : 2 * width], deviations[..., :width]),
    }
    for what, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5, what
    again = run(add, inputs, dropout=0.3, seed=1)[0]
    assert torch.equal(kept(again, inputs).cpu().double().flatten(0, 1), masks[0]), "a pure function of the seed"


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_what_was_not_recomputed_equals_what_is(rate: float) -> None:
    """Activation recomputation runs once without gradients, then with: both must draw the same."""
    x, bias, residual = draw(torch.float32, has_bias=True)
    add, outputs = choose_bias_dropout_add("fused"), []
    for has_gradient in (False, True):
        torch.manual_seed(3)
        with torch.set_grad_enabled(has_gradient):
            outputs.append(add(x.requires_grad_(has_gradient), bias, residual, dropout=rate).detach())
    assert torch.equal(*outputs)


@pytest.mark.parametrize("fault", ["another rate", "no bias", "x and residual exchanged"])
def test_a_deliberate_fault_is_seen(fault: str) -> None:
    x, bias, residual = draw(torch.float32, has_bias=True)
    wanted = reference.bias_dropout_add(x.double(), bias.double(), residual.double(), dropout=0.0)
    given = {
        "another rate": (x / 0.9, bias, residual),
        "no bias": (x, None, residual),
        "x and residual exchanged": (residual, bias, x * 1.01),
    }[fault]
    assert error(choose_bias_dropout_add("fused")(*given, dropout=0.0), wanted) > 1e-3


def test_no_rows_are_nothing_to_add() -> None:
    x, bias, residual = draw(torch.float32, has_bias=True)
    assert choose_bias_dropout_add("fused")(x[:0], bias, residual[:0], dropout=0.0).shape == (0, 2, SHAPE[-1])


def test_who_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_bias_dropout_add("auto", device="cpu") is reference.bias_dropout_add
    assert choose_bias_dropout_add("auto", device="cuda").__module__.endswith("bias_dropout_add.fused")
    assert choose_bias_dropout_add("reference", device="cuda") is reference.bias_dropout_add
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert choose_bias_dropout_add("auto", device="cuda") is reference.bias_dropout_add
    with pytest.raises(ConfigError, match=r"kernels\.bias_dropout_add=fused cannot run.*package triton"):
        choose_bias_dropout_add("fused", device="cuda")
