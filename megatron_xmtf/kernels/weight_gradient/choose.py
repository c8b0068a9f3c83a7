"""Choose who adds the gradient of a linear layer's weight to its fp32 main gradient, once, and say which.

    torch   grad = dY^T X in the run's precision, then main_grad += grad: one more tensor, one more pass over it; it
            is the reference, and may be called so
    apex    main_grad += dY^T X in one matrix product that accumulates in fp32 (fused_weight_gradient_mlp_cuda)

Megatron-Core calls either (tensor_parallel/layers.py, `gradient_accumulation_fusion`).
"""

from __future__ import annotations

import importlib
import logging
from typing import Literal

from megatron_xmtf.errors import ConfigError

__all__ = ["WeightGradientLibrary", "choose_weight_gradient"]

logger = logging.getLogger(__name__)

WeightGradientLibrary = Literal["torch", "apex"]
MODULE = "fused_weight_gradient_mlp_cuda"


def choose_weight_gradient(
    wish: Literal["auto", "reference"] | WeightGradientLibrary, *, has_cuda: bool
) -> WeightGradientLibrary:
    """Return who accumulates weight gradients. auto: apex on a GPU where it can be imported, else torch.

    Raises:  ConfigError: the wish cannot be met.
    """
    chosen: WeightGradientLibrary = "torch"
    if wish == "apex" and not has_cuda:
        raise ConfigError("kernels.weight_gradient=apex runs on a GPU, and there is none here. Use auto or torch.")
    if wish not in ("torch", "reference") and has_cuda:
        try:
            importlib.import_module(MODULE)
            chosen = "apex"
        except ImportError as error:
            if wish == "apex":
                raise ConfigError(
                    f"kernels.weight_gradient=apex needs the module {MODULE}, which cannot be imported ({error}): "
                    "build NVIDIA's apex from source with --cuda_ext (the package `apex` on PyPI is another project), "
                    "or use auto or torch."
                ) from error
    logger.info("weight gradients: %s", chosen)
    return chosen
