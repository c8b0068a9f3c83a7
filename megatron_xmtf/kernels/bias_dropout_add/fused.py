"""Bias, dropout and residual in one Triton kernel: x and residual are read once, the sum is written once.

    columns of a row   | Q | Q | Q | Q | Q ...      one program takes 4 Q of them; Philox draws four numbers at a time,
    Philox's numbers     0   1   2   3   0           one for each quarter

What is dropped is a pure function of seed, row and column, so that the backward pass draws it again: no mask is kept.
Sums are taken in fp32 and rounded once. Gradients: of x the gradient times dropout's factor, of the residual the
gradient itself, of the bias the sum over rows of the first.

Source:  dropout by a seed alone, Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["QUARTER", "bias_dropout_add", "bias_dropout_add_kernel"]

QUARTER = 512
"""Columns that take the same one of Philox's four numbers: 4 a thread of 4 warps."""


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, *, dropout: float) -> Tensor:
    """Return residual + dropout(x + bias), dtype of `x`; arguments as those of `reference.bias_dropout_add`.

    Dropout's seed is drawn from the default generator of the device.
    """
    assert 0.0 <= dropout < 1.0, dropout
    if bias is None and dropout == 0.0:
        return residual.to(x.dtype) + x
    seed = torch.randint(1 << 62, (1,), device=x.device) if dropout > 0.0 else None
    added: Tensor = _BiasDropoutAdd.apply(x, bias, residual, dropout, seed)
    return added


class _BiasDropoutAdd(torch.autograd.Function):
    """Forward and backward of `bias_dropout_add`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float, seed: Tensor | None
    ) -> Tensor:
        ctx.dropout, ctx.types = dropout, (None if bias is None else bias.dtype, residual.dtype)
        ctx.save_for_backward(seed)
        return _launch(x, bias, residual, dropout, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (seed,), (of_sum,) = ctx.saved_tensors, gradients
        of_x = of_sum if seed is None else _launch(of_sum, None, None, ctx.dropout, seed)
        bias_type, residual_type = ctx.types
        of_bias = None
        if bias_type is not None and ctx.needs_input_grad[1]:
            of_bias = of_x.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_type)
        return of_x, of_bias, of_sum.to(residual_type), None, None


def _launch(x: Tensor, bias: Tensor | None, residual: Tensor | None, dropout: float, seed: Tensor | None) -> Tensor:
    """Run the kernel over the rows of x; without bias and residual it is dropout alone."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    output = torch.empty_like(x)
    columns = x.size(-1)
    rows = x.numel() // columns
    if not rows:
        return output
    # What a kernel does not read is given something that it could.
    bias_dropout_add_kernel[rows, triton.cdiv(columns, 4 * QUARTER)](
        *(x, x if bias is None else bias, x if residual is None else residual, output, x if seed is None else seed),
        *(columns, dropout),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        DROPS=seed is not None,
        QUARTER=QUARTER,
    )
    return output


@triton.jit
def _add(
    x_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    drawn,
    row,
    first,
    columns,
    dropout,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DROPS: tl.constexpr,
    QUARTER: tl.constexpr,
):
    """Do the columns first ... first + QUARTER - 1 of a row."""
    column = first + tl.arange(0, QUARTER)
    inside = column < columns
    place = row * columns + column
    values = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        # 24 bits, so that every number is a float; kept if not below the share that is dropped.
        uniform = (drawn >> 8).to(tl.float32) * (1.0 / 16777216.0)
        values = tl.where(uniform >= dropout, values * (1.0 / (1.0 - dropout)), 0.0)
    if HAS_RESIDUAL:
        values += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + place, values.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_dropout_add_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    seed_ptr,
    columns,
    dropout,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DROPS: tl.constexpr,
    QUARTER: tl.constexpr,
):
    """Add up one part of one row of [rows, columns]; grid (rows, blocks of 4 QUARTER columns).

    Args:  x, residual, output: contiguous. bias: [columns]. seed: int64 [1], read where DROPS.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (4 * QUARTER)
    if DROPS:
        lane = tl.program_id(1) * QUARTER + tl.arange(0, QUARTER)
        d0, d1, d2, d3 = tl.philox(tl.load(seed_ptr), lane, tl.program_id(0) + lane * 0, lane * 0, lane * 0, 7)
    else:
        d0, d1, d2, d3 = 0, 0, 0, 0
    for quarter in tl.static_range(4):
        drawn = d0 if quarter == 0 else (d1 if quarter == 1 else (d2 if quarter == 2 else d3))
        _add(
            x_ptr,
            bias_ptr,
            residual_ptr,
            output_ptr,
            drawn,
            row,
            first + quarter * QUARTER,
            columns,
            dropout,
            HAS_BIAS,
            HAS_RESIDUAL,
            DROPS,
            QUARTER,
        )
