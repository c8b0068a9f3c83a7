"""Choose who computes bias and tanh-GELU between the feed-forward products, plain or gated, once, and say which.

kernels.activation   device   passes over [tokens, 4 h], forward                     kept for the backward pass
torch, reference     any      bias; GELU; gated: the product                         each one's input
megatron_core        cuda     one, compiled by torch.compile (fused_bias_gelu,       the product's output alone
                              fused_bias_geglu), and one backward                    auto on a GPU where Triton can run

Both have the same constants, 0.79788456 and 0.044715. Norms stay torch's LayerNorm and RMSNorm: they have fused
kernels, and Liger's LayerNorm, by its own published figures, is slower below 8,192 columns on an H100, forward and
backward (benchmarks/gpu.py measures both).
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.segment_attention.available import why_not_fused

__all__ = ["ActivationLibrary", "choose_activation"]

logger = logging.getLogger(__name__)

ActivationLibrary = Literal["torch", "megatron_core"]


def choose_activation(
    wish: Literal["auto", "reference"] | ActivationLibrary,
    *,
    is_tanh_gelu: bool,
    device: Literal["cpu", "cuda"] | None = None,
) -> ActivationLibrary:
    """Return who computes the activation.

    Args:    is_tanh_gelu: of the model; others are torch's. device: None: where this machine computes.
    Raises:  ConfigError: the wish cannot be met.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = why_not_fused(device=device)
    if device == "cpu":
        obstacle = "it is compiled for GPUs, and this run computes on a CPU"
    if not is_tanh_gelu:
        obstacle = "Megatron-Core fuses tanh-GELU, and this model has another activation"
    if wish == "megatron_core" and obstacle is not None:
        raise ConfigError(f"kernels.activation=megatron_core cannot run: {obstacle}. Use auto or torch.")
    chosen: ActivationLibrary = "torch" if wish in ("torch", "reference") or obstacle is not None else "megatron_core"
    logger.info("activation: %s", chosen)
    return chosen
