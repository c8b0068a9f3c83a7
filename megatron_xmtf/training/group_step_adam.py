"""AdamW that Megatron-Core's distributed optimizer can save, load and go on with.

It expects what NVIDIA's FusedAdam has: the step count in the parameter group. torch's AdamW keeps one step tensor a
parameter; loaded from a checkpoint all parameters share one, it is counted up once per parameter, and training goes
wrong without an error. `GroupStepAdam` has the step where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["GroupStepAdam", "ReferenceAdam", "update"]


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW whose step count is an int in each parameter group; state holds exp_avg and exp_avg_sq alone.

    Computes what torch.optim.AdamW computes, through the same fused kernel.

    Args:  lr, betas, eps, weight_decay: as torch.optim.AdamW. adam_w_mode: must be True; Megatron-Core passes it.
    """

    has_fused_kernel = True
    """Whether one kernel does the whole update of a tensor."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is offered"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Megatron-Core passes no closure"
        for group in self.param_groups:
            group["step"] += 1
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            for parameter in params:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            update(
                params,
                [_gradient(parameter) for parameter in params],
                [self.state[parameter] for parameter in params],
                group=group,
                fused=self.has_fused_kernel,
            )


class ReferenceAdam(GroupStepAdam):
    """`GroupStepAdam` by torch's loop over parameters and operations: the reference of the fused ones."""

    has_fused_kernel = False


def update(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    group: dict[str, Any],
    fused: bool = True,
) -> None:
    """Update tensors in place by torch's AdamW, with the settings and the step of a parameter group.

    Args:    states: exp_avg and exp_avg_sq of each tensor. group: its `step` counts the update that is being done.
             fused: all in one kernel; else a loop over parameters and operations.
    """
    # torch counts each of its step tensors up by one: a fresh one for every parameter, filled on the device, since
    # each copy there would be waited for.
    steps = list(torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind())
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "only parameters with a gradient are updated"
    return parameter.grad
