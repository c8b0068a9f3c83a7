"""Choose the attention of an encoder-decoder, once, and say which.

kernels.attention   device   work of a row of s tokens in segments of l
segments            cpu      sum of l^2                                  auto on a CPU
fused               cuda     blocks of segments                          auto on a GPU where Triton can run
reference           any      s^2, scores kept                            auto on other GPUs
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.relative_attention import reference, segments
from megatron_xmtf.kernels.segment_attention.available import why_not_fused

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


def choose_relative_attention(
    wish: str, *, device: Literal["cpu", "cuda"] | None = None, head_dim: int | None = None
) -> RelativeAttention:
    """Return the implementation for a run.

    Args:    wish: `kernels.attention`. device: None: where this machine computes, a GPU if it has one. head_dim: of the
             model, if it is known.
    Raises:  ConfigError: the wish cannot be met.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    obstacle, why = why_not_fused(device=device, head_dim=head_dim), ""
    name = wish
    if wish == "auto" and device == "cpu":
        name = "segments"
    elif wish == "auto" and obstacle is None:
        name = "fused"
    elif wish == "auto":
        name, why = "reference", f", not fused: {obstacle}"
    if name == "fused" and obstacle is not None:
        raise ConfigError(f"kernels.attention=fused cannot run: {obstacle}. Use auto.")
    if name != "fused" and name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"kernels.attention={wish} is made for decoder models: torch's fused attention gives no gradient of a "
            f"learned bias. Use auto, fused, {' or '.join(IMPLEMENTATIONS)} for an encoder-decoder."
        )
    if name == "segments" and device == "cuda":
        raise ConfigError(
            "kernels.attention=segments is made for a CPU, and this run computes on a GPU: it would wait for the "
            "device in every step to learn the lengths of the segments. Use auto or reference."
        )
    logger.info("attention of encoder and decoder: %s%s", name, why)
    return _fused() if name == "fused" else IMPLEMENTATIONS[name]


def _fused() -> RelativeAttention:
    """Import the Triton kernels, which a machine without Triton cannot."""
    fused = importlib.import_module("megatron_xmtf.kernels.relative_attention.fused")
    return RelativeAttention("fused", fused.find_segment_ranges, fused.relative_attention)
