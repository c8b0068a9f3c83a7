"""How far attention may be from exact, by its arithmetic alone: a bound of each element of its result and gradients.

Worst cases to first order, of any kernel that multiplies [query, key] by [key, d] in one precision or another, whatever
the order in which it adds. u is fp32's unit roundoff, v that of the inputs' precision, of which results are too.

    q k^T          d roundings of the products' sum:   d u |q| |k|^T
    exp            20 units in the last place (torch's vectorised `exp_u20`), 40 u
    p = softmax    relative: error of its score, and of all scores of its query as p weighs them
    narrow casts   v of what is cast: weights before they meet values, results, and (in autograd's plain products, in
                   fused kernels) dp, ds, and the context within delta; half a step of a denormal where fp16 is near 0
    parts          gradients of keys and values that come of several calls are cast each, then added up

Source:  Higham 2002, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_bounds"]

UNIT = 2.0**-24
EXP = 40.0
"""Unit roundoffs of an exponential."""


def attention_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    cotangent: Tensor,
    *,
    dtype: torch.dtype,
    apart: Tensor | None = None,
) -> list[Tensor]:
    """Return the largest error of context [s, b, n * d] and of the gradients of query, key, value [s, b, n, d].

    Args:  query, key, value: float64 [s, b, n, d], as a kernel is given them. bias: float64 [b, n, s, s], -inf where
           nothing is seen. cotangent: float64 [s, b, n * d]. dtype: the kernel's.
           apart: bool [b, s], queries that may have a call of their own.
    """
    sequence, _, heads, head_dim = query.shape
    scale, unit = head_dim**-0.5, UNIT
    q, k, v, of_context = (t.permute(1, 2, 0, 3) for t in (query, key, value, cotangent.unflatten(2, (heads, -1))))
    wide_q, wide_k, wide_v, wide_of = (t.abs() for t in (q, k, v, of_context))

    def cast(values: Tensor) -> Tensor:
        kind = torch.finfo(dtype)
        return values.abs() * (kind.eps / 2) + kind.smallest_normal * kind.eps / 2

    products = scale * (wide_q @ wide_k.mT)
    seen = bias.nan_to_num(neginf=0.0)
    scores = scale * (q @ k.mT) + seen
    p = (scores + bias.masked_fill(bias.isfinite(), 0.0)).softmax(-1)
    largest = scores.abs().masked_fill(p == 0.0, 0.0).amax(-1, keepdim=True)
    of_score = unit * ((head_dim + 4) * products + 3 * seen.abs() + 2 * largest)
    relative = of_score + (p * of_score).sum(-1, keepdim=True) + unit * (2 * EXP + sequence + 3)
    of_p = p * relative
    weights = of_p + cast(p) * (p > 0.0)
    context = p @ v
    of_result = (weights + sequence * unit * p) @ wide_v + cast(context)

    dp = of_context @ v.mT
    of_dp = head_dim * unit * (wide_of @ wide_v.mT) + cast(dp)
    delta = (p * dp).sum(-1, keepdim=True)
    of_delta = (of_p * dp.abs() + p * of_dp + sequence * unit * p * dp.abs()).sum(-1, keepdim=True)
    of_delta = of_delta + (wide_of * cast(context)).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    of_ds = of_p * (dp - delta).abs() + p * (of_dp + of_delta) + 2 * unit * ds.abs() + cast(ds) * (p > 0.0)
    of_ds = scale * (of_ds + (sequence + 2) * unit * ds.abs())
    of_query = of_ds @ wide_k + cast(scale * ds @ k)
    of_key, of_value = of_ds.mT @ wide_q, (weights + sequence * unit * p).mT @ wide_of
    parts = [torch.ones_like(p[:, :1, :, :1])]
    if apart is not None:
        mine = apart[:, None, :, None].double()
        parts = [*parts, mine, 1.0 - mine]
    for part in parts:
        of_key = of_key + cast(scale * (part * ds).mT @ q)
        of_value = of_value + cast((part * p).mT @ of_context)
    gradients = [bound.permute(2, 0, 1, 3) for bound in (of_query, of_key, of_value)]
    return [of_result.permute(2, 0, 1, 3).flatten(2), *gradients]
