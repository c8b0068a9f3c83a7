"""AdamW whose moments live in the CPU's memory and whose update is computed there (`optimizer.offload: cpu`).

    device                    CPU, of one parameter at a time
    gradient, parameter  -->  staged copies (pinned)
                              fused AdamW of torch over them and exp_avg, exp_avg_sq, which never leave
    parameter            <--  staged parameter

A GPU is spared 8 bytes a number of the rank's share and pays 8 down and 4 up over its bus, every step. On a machine
without one everything is in the CPU's memory already: the same code runs, and copies to and fro for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_xmtf.training.group_step_adam import GroupStepAdam, update

__all__ = ["OffloadedAdam"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdam(GroupStepAdam):
    """`GroupStepAdam` with its state on the CPU: the same numbers, the same checkpoint.

    Only fp32 parameters: Megatron-Core hands its main parameters to the optimizer.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._staged = torch.empty(2, 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, one after the other."""
        assert closure is None, "Megatron-Core passes no closure"
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; torch moves the state to the parameters' device, from where it is taken back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = _in_cpu_memory(state[name])

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        assert parameter.dtype == torch.float32, "main parameters are fp32"
        state = self.state[parameter]
        for name in MOMENTS:
            # Megatron-Core makes zeros on the parameter's own device before it loads a checkpoint.
            if name not in state or state[name].device.type != "cpu":
                state[name] = _in_cpu_memory(state[name] if name in state else torch.zeros(parameter.shape))
        weight, staged_gradient = self._stage(parameter), self._stage(gradient, row=1)
        update([weight], [staged_gradient], [state], group=group)
        parameter.copy_(weight)

    def _stage(self, tensor: Tensor, *, row: int = 0) -> Tensor:
        """Copy a tensor into this object's own CPU memory, as large as the largest parameter so far."""
        if self._staged.size(1) < tensor.numel():
            self._staged = _in_cpu_memory(torch.empty(2, tensor.numel()))
        staged = self._staged[row, : tensor.numel()].view(tensor.shape)
        return staged.copy_(tensor)


def _in_cpu_memory(tensor: Tensor) -> Tensor:
    """Return a tensor in CPU memory, page-locked where there is a GPU to copy to."""
    tensor = tensor.cpu()
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
