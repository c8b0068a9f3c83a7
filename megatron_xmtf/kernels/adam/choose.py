"""Choose whose fused AdamW updates the parameters, once, and say which.

    reference            torch's loop over parameters and operations, any device
    torch                torch's fused kernel, any device
    transformer_engine   NVIDIA's FusedAdam, on a GPU
    apex                 the same, older

All keep the step in the parameter group and exp_avg and exp_avg_sq in the state, as Megatron-Core's checkpoints
have them.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, Literal

from megatron_xmtf.errors import ConfigError

__all__ = ["AdamLibrary", "choose_adam", "import_fused_adam"]

logger = logging.getLogger(__name__)

AdamLibrary = Literal["reference", "torch", "transformer_engine", "apex"]

MODULES: dict[AdamLibrary, str] = {
    # In the order of `auto`, which is Megatron-Core's own.
    "transformer_engine": "transformer_engine.pytorch.optimizers",
    "apex": "apex.optimizers",
}
REMEDIES: dict[AdamLibrary, str] = {
    "transformer_engine": "install transformer-engine[pytorch]",
    "apex": "build NVIDIA's apex from source (the package `apex` on PyPI is another project)",
}


def choose_adam(wish: Literal["auto"] | AdamLibrary, *, has_cuda: bool) -> AdamLibrary:
    """Return whose AdamW a run updates with.

    auto is, on a GPU, the first that can be imported of Transformer Engine and NVIDIA's apex; otherwise torch.

    Raises:  ConfigError: the wish cannot be met.
    """
    if wish == "transformer_engine" or wish == "apex":
        if not has_cuda:
            raise ConfigError(f"kernels.adam={wish} runs on a GPU, and there is none here. Use auto or torch.")
        import_fused_adam(wish)
        chosen: AdamLibrary = wish
    elif wish == "reference":
        chosen = "reference"
    elif wish == "torch" or not has_cuda:
        chosen = "torch"
    else:
        chosen = next((library for library in MODULES if _is_importable(library)), "torch")
    logger.info("adam: %s", chosen)
    return chosen


def import_fused_adam(library: AdamLibrary) -> Any:
    """Return the class FusedAdam of a library.

    Raises:  ConfigError: it cannot be imported; why, and the way out.
    """
    try:
        return importlib.import_module(MODULES[library]).FusedAdam
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"kernels.adam={library} needs {MODULES[library]}.FusedAdam, which cannot be imported ({error}): "
            f"{REMEDIES[library]}, or use auto or torch."
        ) from error


def _is_importable(library: AdamLibrary) -> bool:
    try:
        import_fused_adam(library)
    except ConfigError:
        return False
    return True
