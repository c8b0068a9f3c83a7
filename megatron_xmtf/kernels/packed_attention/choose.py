"""Choose the implementation of packed attention, once, and say which."""

from __future__ import annotations

import logging
from typing import Literal, Protocol

from torch import Tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.packed_attention import reference, sdpa

__all__ = ["PackedAttention", "choose_packed_attention"]

logger = logging.getLogger(__name__)


class PackedAttention(Protocol):
    """What an implementation looks like; see `reference.packed_attention` for shapes."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Return the context, [s, b, n * d]."""
        ...


def choose_packed_attention(
    wish: Literal["auto", "reference", "sdpa"], *, precision: Literal["fp32", "bf16", "fp16"]
) -> PackedAttention:
    """Return the implementation for a run.

    auto is sdpa in fp32 and the reference in half precision (where torch cannot keep the bias in fp32).

    Raises:  ConfigError: the wish cannot be met.
    """
    if wish == "sdpa" and precision != "fp32":
        raise ConfigError(
            f"kernels.attention=sdpa needs precision=fp32, it is {precision}: torch would round the ALiBi bias to "
            f"{precision}. Use auto or reference."
        )
    chosen = ("sdpa" if precision == "fp32" else "reference") if wish == "auto" else wish
    logger.info("packed attention: %s", chosen)
    return sdpa.packed_attention if chosen == "sdpa" else reference.packed_attention
