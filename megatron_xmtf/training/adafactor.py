"""Adafactor over tensor-parallel shards: T5X's optimizer, the same update at any tensor-parallel size.

Adafactor keeps of a matrix's squared gradients their means over rows and over columns alone. With a matrix cut over
tensor-parallel ranks one of the two, and both root mean squares, need a sum over the ranks:

    weight [rows, columns]   whole           cut along rows       cut along columns
    exp_avg_sq_row [rows]    own             own part             summed over ranks
    exp_avg_sq_col [columns] own             summed over ranks    own part
    mean of exp_avg_sq_row   own             = mean of _col       own
    rms of update, weight    own             summed over ranks    summed over ranks

    V[i, j] = row[i] * col[j] / mean(row)       update = gradient / sqrt(V), divided by max(1, rms(update) / threshold)

All sums of a step go through two all-reduces. Rows that only pad the vocabulary count nowhere: with them the root
mean squares, hence the training, would depend on the padding.
Source:  Shazeer and Stern 2018, arXiv:1804.04235, algorithm 5; google-research/t5x t5x/adafactor.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["Adafactor", "ParameterShard"]


@dataclass(frozen=True)
class ParameterShard:
    """Which part of a parameter this rank holds."""

    split_axis: int | None
    """Axis that is cut over the tensor-parallel ranks; None: every rank holds the whole."""
    shape: tuple[int, ...]
    """Shape of the whole parameter, without rows that only pad the vocabulary."""
    own_rows: int
    """Leading rows of this rank's part that are no padding."""


@dataclass
class _Work:
    """One parameter in one step; tensors are this rank's part, without rows of padding."""

    parameter: Tensor
    update: Tensor
    """The gradient, until it is turned into the update in place."""
    state: dict[str, Tensor]
    shard: ParameterShard
    group: dict[str, Any]
    means: dict[str, Tensor]
    """Statistic -> mean of squared gradients over the whole of an axis; a sum until it is divided."""
    parameter_squares: Tensor
    """Sum of squares of the whole parameter, a scalar."""

    def crossing_sums(self) -> list[Tensor]:
        """Return the sums that this rank holds a part of."""
        crossed = {0: "exp_avg_sq_col", 1: "exp_avg_sq_row"}
        if self.shard.split_axis is None:
            return []
        name = crossed[self.shard.split_axis]
        return [self.parameter_squares, *([self.means[name]] if name in self.means else [])]

    def rate(self) -> Tensor | float:
        """Return the step size of this parameter."""
        if not self.group["multiply_by_parameter_scale"]:
            return float(self.group["lr"])
        scale = (self.parameter_squares / math.prod(self.shard.shape)).sqrt()
        return scale.clamp(min=self.group["epsilon2"]) * self.group["lr"]


class Adafactor(torch.optim.Optimizer):
    """Adafactor without first moment and with an outer learning rate; parameters are fp32 matrices and vectors.

    The step count is in the parameter group, as in `GroupStepAdam`. `step` turns the gradients into the updates in
    place, so that it needs no memory beside the statistics and one temporary of the largest parameter.

    Args:  lr: step size, relative to the parameter's root mean square with `multiply_by_parameter_scale`.
           decay_rate: second moments decay by 1 - step ** -decay_rate. clipping_threshold: largest root mean square
           of an update. epsilon1: added to squared gradients. epsilon2: least root mean square of a parameter.
           weight_decay: decoupled, times the rate of the parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        decay_rate: float = 0.8,
        clipping_threshold: float = 1.0,
        multiply_by_parameter_scale: bool = True,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "decay_rate": decay_rate,
            "clipping_threshold": clipping_threshold,
            "multiply_by_parameter_scale": multiply_by_parameter_scale,
            "epsilon1": epsilon1,
            "epsilon2": epsilon2,
            "weight_decay": weight_decay,
            "step": 0,
        }
        super().__init__(params, defaults)
        self._shards: dict[Tensor, ParameterShard] = {}
        self._ranks: torch.distributed.ProcessGroup | None = None

    def distribute(self, shards: Mapping[Tensor, ParameterShard], *, ranks: torch.distributed.ProcessGroup) -> None:
        """Say which parts of its parameters this rank holds; without this call all are whole.

        Args:    shards: of every parameter. ranks: the tensor-parallel group.
        """
        self._shards, self._ranks = dict(shards), ranks
        missing = [parameter for group in self.param_groups for parameter in group["params"] if parameter not in shards]
        assert not missing, f"{len(missing)} parameters have no shard"

    def initialize_state(self) -> None:
        """Make the statistics of every parameter that has none, for a checkpoint to be loaded into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = _empty_statistics(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; all tensor-parallel ranks call it together."""
        assert closure is None, "Megatron-Core passes no closure"
        for group in self.param_groups:
            group["step"] += 1
        work = [
            self._begin(parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._add_up([tensor for one in work for tensor in one.crossing_sums()])
        for one in work:
            _take_up_means(one)
            _turn_into_update(one)
        update_squares = [one.update.square().sum() for one in work]
        self._add_up([part for part, one in zip(update_squares, work, strict=True) if one.shard.split_axis is not None])
        for one, squares in zip(work, update_squares, strict=True):
            _apply(one, squares)

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> _Work:
        """Sum this rank's squared gradients and weights up."""
        assert parameter.dim() in (1, 2), f"a parameter of shape {tuple(parameter.shape)} is no matrix and no vector"
        assert parameter.grad is not None and parameter.dtype == parameter.grad.dtype == torch.float32
        if not self.state[parameter]:
            self.state[parameter] = _empty_statistics(parameter)
        whole = ParameterShard(split_axis=None, shape=tuple(parameter.shape), own_rows=len(parameter))
        shard = self._shards.get(parameter, whole)
        gradient, weight = parameter.grad[: shard.own_rows], parameter[: shard.own_rows]
        squares = gradient.square().add_(group["epsilon1"])
        if parameter.dim() == 2:
            means = {"exp_avg_sq_row": squares.sum(dim=1), "exp_avg_sq_col": squares.sum(dim=0)}
        else:
            means = {"exp_avg_sq": squares}
        return _Work(
            parameter=weight,
            update=gradient,
            state=self.state[parameter],
            shard=shard,
            group=group,
            means=means,
            parameter_squares=weight.square().sum(),
        )

    def _add_up(self, parts: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the tensor-parallel ranks, all in one all-reduce."""
        if self._ranks is None or self._ranks.size() == 1 or not parts:
            return
        joined = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(joined, group=self._ranks)
        for part, total in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.reshape(part.shape))


def _empty_statistics(parameter: Tensor) -> dict[str, Tensor]:
    """Return the statistics before the first step, padded rows included: they have the parameter's own shape."""
    if parameter.dim() == 2:
        rows, columns = parameter.shape
        return {"exp_avg_sq_row": parameter.new_zeros(rows), "exp_avg_sq_col": parameter.new_zeros(columns)}
    return {"exp_avg_sq": torch.zeros_like(parameter)}


def _take_up_means(one: _Work) -> None:
    """Let the statistics follow this step's mean squares; the first step sets them."""
    kept = 1.0 - one.group["step"] ** -one.group["decay_rate"]
    if "exp_avg_sq_row" in one.means:
        rows, columns = one.shard.shape
        one.means["exp_avg_sq_row"] /= columns
        one.means["exp_avg_sq_col"] /= rows
    for name, mean in one.means.items():
        one.state[name][: len(mean)].mul_(kept).add_(mean, alpha=1.0 - kept)


def _turn_into_update(one: _Work) -> None:
    """Divide the gradient by the root of its second moment."""
    if "exp_avg_sq" in one.state:
        one.update.mul_(one.state["exp_avg_sq"][: one.shard.own_rows].rsqrt())
        return
    row, column = one.state["exp_avg_sq_row"][: one.shard.own_rows], one.state["exp_avg_sq_col"]
    # Both means are the mean of all numbers; the one over an axis that is not cut is whole on this rank.
    whole = column if one.shard.split_axis == 0 else row
    one.update.mul_((row / whole.mean()).rsqrt()[:, None]).mul_(column.rsqrt())


def _apply(one: _Work, update_squares: Tensor) -> None:
    """Clip the update and subtract it."""
    root_mean_square = (update_squares / math.prod(one.shard.shape)).sqrt()
    rate = one.rate()
    if one.group["weight_decay"]:
        one.parameter.mul_(1.0 - one.group["weight_decay"] * rate)
    clipped = (root_mean_square / one.group["clipping_threshold"]).clamp(min=1.0)
    one.parameter.sub_(one.update.mul_(rate / clipped))
