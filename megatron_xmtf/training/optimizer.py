"""AdamW and Adafactor in Megatron-Core's optimizers, and two cures for silent faults of resuming with them.

Megatron-Core's distributed optimizer expects what NVIDIA's FusedAdam has: the step count in the parameter group.
torch's AdamW keeps one step tensor a parameter; loaded from a checkpoint all parameters share one, it is counted up
once per parameter, and training goes wrong without an error. `GroupStepAdam` has the step where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_xmtf.config.schema import OptimizerConfig, RunConfig
from megatron_xmtf.models.registry import DTYPES
from megatron_xmtf.training.factored_state import wrap_adafactor

__all__ = ["GroupStepAdam", "apply_settings", "build_optimizer", "set_learning_rate"]


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW whose step count is an int in each parameter group; state holds exp_avg and exp_avg_sq alone.

    Computes what torch.optim.AdamW computes, through the same fused kernel.

    Args:  lr, betas, eps, weight_decay: as torch.optim.AdamW. adam_w_mode: must be True; Megatron-Core passes it.
    """

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
            # The kernel counts each of its step tensors up by one: a fresh one for every parameter.
            steps = [torch.tensor(float(group["step"] - 1), device=parameter.device) for parameter in params]
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [_gradient(parameter) for parameter in params],
                [self.state[parameter]["exp_avg"] for parameter in params],
                [self.state[parameter]["exp_avg_sq"] for parameter in params],
                [],
                steps,
                foreach=False,
                fused=True,
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


INITIAL_LOSS_SCALE = 2.0**12
"""Of fp16, as in BigScience's DeepSpeed settings (initial_scale_power 12); it doubles when steps stay finite. From
Megatron-Core's 2^32 a run's first steps, about twenty, all overflow and train nothing."""


def build_optimizer(config: RunConfig, chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """Build Megatron-Core's optimizer over DDP-wrapped chunks whose weights are loaded.

    Norms and biases are not decayed. NVIDIA's fused Adam is used where Transformer Engine or apex brings it.
    """
    settings = config.optimizer
    mcore_config = _mcore_config(config)
    if settings.name == "adafactor":
        optimizer: MegatronOptimizer = wrap_adafactor(chunks, mcore_config)
    else:
        if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
            _install_group_step_adam()
        optimizer = get_megatron_optimizer(mcore_config, list(chunks))
    apply_settings(optimizer, settings)
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if isinstance(part, DistributedOptimizer):
            _count_bucket_padding(part)
    return optimizer


def apply_settings(optimizer: MegatronOptimizer, settings: OptimizerConfig) -> None:
    """Set what the configuration says of every parameter group; the learning rate has its own schedule.

    A loaded checkpoint brings the values of the run that wrote it: without this, settings that were changed on
    purpose (`--allow-change optimizer.adam_beta2`) would be put back without a word.
    """
    for group in optimizer.param_groups:
        # Megatron-Core marks norms and biases with wd_mult 0 and leaves it to Megatron-LM's scheduler to obey.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        if settings.name == "adafactor":
            group["decay_rate"] = settings.adafactor_decay_rate
            group["clipping_threshold"] = settings.adafactor_clipping_threshold
            group["multiply_by_parameter_scale"] = settings.adafactor_multiply_by_parameter_scale
            group["epsilon1"] = settings.adafactor_epsilon1
            group["epsilon2"] = settings.adafactor_epsilon2
        else:
            group["betas"] = (settings.adam_beta1, settings.adam_beta2)
            group["eps"] = settings.adam_eps


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _mcore_config(config: RunConfig) -> McoreOptimizerConfig:
    settings = config.optimizer
    return McoreOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        initial_loss_scale=INITIAL_LOSS_SCALE,
        params_dtype=DTYPES[config.precision],
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )


def _install_group_step_adam() -> None:
    """Make Megatron-Core build `GroupStepAdam` and treat it as it treats NVIDIA's FusedAdam."""
    mcore_optimizer.Adam = GroupStepAdam
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupStepAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _count_bucket_padding(optimizer: DistributedOptimizer) -> None:
    """Keep the padding between buckets while state is gathered for a `fully_reshardable` checkpoint.

    Megatron-Core 0.16 drops that padding when it joins the buckets, then cuts parameters out by offsets that count
    it: with several buckets whose sizes are no multiple of lcm(dp, 128) the saved moments are shifted. It shows as
    wrong losses from the second step after a resume.
    """
    gather = optimizer.get_parameter_state_dp_zero

    @wraps(gather)
    def gather_with_padding(*arguments: Any, **keywords: Any) -> Any:
        saved = [
            (buffer, buffer.numel_unpadded, [bucket.numel_unpadded for bucket in buffer.buckets])
            for buffer in optimizer.buffers
        ]
        try:
            for buffer, _, _ in saved:
                buffer.numel_unpadded = buffer.numel
                for bucket in buffer.buckets:
                    bucket.numel_unpadded = bucket.grad_data.numel()
            return gather(*arguments, **keywords)
        finally:
            for buffer, numel, bucket_numels in saved:
                buffer.numel_unpadded = numel
                for bucket, bucket_numel in zip(buffer.buckets, bucket_numels, strict=True):
                    bucket.numel_unpadded = bucket_numel

    optimizer.get_parameter_state_dp_zero = gather_with_padding
