"""AdamW and Adafactor in Megatron-Core's optimizers, with the settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_xmtf.config.schema import OptimizerConfig, RunConfig
from megatron_xmtf.kernels.adam import choose_adam, import_fused_adam
from megatron_xmtf.models.registry import DTYPES
from megatron_xmtf.training.factored_state import wrap_adafactor
from megatron_xmtf.training.group_step_adam import GroupStepAdam, ReferenceAdam
from megatron_xmtf.training.offloaded_adam import OffloadedAdam

__all__ = ["GroupStepAdam", "apply_settings", "build_optimizer", "set_learning_rate"]


INITIAL_LOSS_SCALE = 2.0**12
"""Of fp16, as in BigScience's DeepSpeed settings (initial_scale_power 12); it doubles when steps stay finite. From
Megatron-Core's 2^32 a run's first steps, about twenty, all overflow and train nothing."""


def build_optimizer(config: RunConfig, chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """Build Megatron-Core's optimizer over DDP-wrapped chunks whose weights are loaded.

    Norms and biases are not decayed.

    Raises:  ConfigError: `kernels.adam` names a library that cannot be used here.
    """
    settings = config.optimizer
    mcore_config = _mcore_config(config)
    if settings.name == "adafactor":
        optimizer: MegatronOptimizer = wrap_adafactor(chunks, mcore_config)
    else:
        _install(config)
        optimizer = get_megatron_optimizer(mcore_config, list(chunks))
    apply_settings(optimizer, settings)
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


def _install(config: RunConfig) -> None:
    """Make Megatron-Core build the Adam of this run, whatever it found at its import or was given before."""
    if config.optimizer.offload == "cpu":
        _install_adam(OffloadedAdam)
        return
    library = choose_adam(config.kernels.adam, has_cuda=torch.cuda.is_available())
    if library == "torch":
        _install_group_step_adam()
    elif library == "reference":
        _install_adam(ReferenceAdam)
    else:
        _install_adam(import_fused_adam(library), is_transformer_engine=library == "transformer_engine")


def _install_group_step_adam() -> None:
    _install_adam(GroupStepAdam)


def _install_adam(adam: Any, *, is_transformer_engine: bool = False) -> None:
    """Make Megatron-Core build `adam` and treat it as NVIDIA's FusedAdam, whose step is in the parameter group."""
    mcore_optimizer.Adam = adam
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = is_transformer_engine
    distrib_optimizer.USING_APEX_OPTIMIZER = not is_transformer_engine
