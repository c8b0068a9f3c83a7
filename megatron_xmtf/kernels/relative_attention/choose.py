"""Choose the attention of an encoder-decoder, once, and say which.

kernels.attention   device   work of a row of s tokens in segments of l
segments            cpu      sum of l^2                                  auto on a CPU
reference           any      s^2, scores kept                            auto on a GPU
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.relative_attention import reference, segments

__all__ = ["RelativeAttention", "choose_relative_attention"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RelativeAttention:
    """One implementation, in two parts: what all layers of a forward pass share, and the attention of one layer."""

    name: str
    """As `kernels.attention` says it."""
    prepare: Callable[..., Any]
    """Segment ids of queries [b, q] and keys [b, k], causal -> an object with `longest`, for `attend`."""
    attend: Callable[..., Tensor]
    """See `reference.relative_attention`."""


IMPLEMENTATIONS = {
    "reference": RelativeAttention("reference", reference.find_dense_segments, reference.relative_attention),
    "segments": RelativeAttention("segments", segments.find_segment_runs, segments.relative_attention),
}


def choose_relative_attention(wish: str, *, device: Literal["cpu", "cuda"] | None = None) -> RelativeAttention:
    """Return the implementation for a run.

    Args:    wish: `kernels.attention`. device: None: where this machine computes, a GPU if it has one.
    Raises:  ConfigError: the wish cannot be met.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = ("segments" if device == "cpu" else "reference") if wish == "auto" else wish
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"kernels.attention={wish} is made for decoder models: torch's fused attention gives no gradient of a "
            f"learned bias. Use auto, {' or '.join(IMPLEMENTATIONS)} for an encoder-decoder."
        )
    if name == "segments" and device == "cuda":
        raise ConfigError(
            "kernels.attention=segments is made for a CPU, and this run computes on a GPU: it would wait for the "
            "device in every step to learn the lengths of the segments. Use auto or reference."
        )
    logger.info("attention of encoder and decoder: %s", name)
    return IMPLEMENTATIONS[name]
