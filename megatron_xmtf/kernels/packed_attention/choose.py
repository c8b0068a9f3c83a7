"""Choose the implementation of packed attention, once, and say which.

kernels.attention   device   precision          work of a row of s tokens in segments of l
segments            cpu      any                sum of l^2                 auto on a CPU
fused               cuda     any                blocks of segments         auto on a GPU where Triton can run
sdpa                any      fp32               s^2, dense fp32 bias       auto on other GPUs in fp32
reference           any      any                s^2, scores kept           auto on other GPUs in bf16 and fp16
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.packed_attention import reference, sdpa, segments
from megatron_xmtf.kernels.segment_attention.available import why_not_fused

__all__ = ["PackedAttention", "Prepare", "choose_packed_attention"]

logger = logging.getLogger(__name__)


class Prepare(Protocol):
    """Learn, once a forward pass and without gradient, what `attend` needs to know of the segments."""

    def __call__(self, segment_ids: Tensor, slopes: Tensor, prefix_mask: Tensor | None = None) -> Any:
        """Prepare.

        Args:  segment_ids: int [b, s]. slopes: fp32 [n], this rank's heads. prefix_mask: bool [b, s], the inputs that
               begin each segment and are seen by all of it (prefix-LM); None: every segment is causal.
        """


@dataclass(frozen=True)
class PackedAttention:
    """One implementation, in two parts: what all layers of a forward pass share, and the attention of one layer."""

    name: str
    """As `kernels.attention` says it."""
    prepare: Prepare
    """segment_ids, slopes, prefix_mask -> what `attend` needs to know of the segments."""
    attend: Callable[..., Tensor]
    """query, key, value [s, b, n, d], what `prepare` returned, dropout -> [s, b, n * d]; see `reference`."""


IMPLEMENTATIONS = {
    "reference": PackedAttention("reference", reference.packed_bias, reference.packed_attention),
    "sdpa": PackedAttention("sdpa", reference.packed_bias, sdpa.packed_attention),
    "segments": PackedAttention("segments", segments.find_segments, segments.packed_attention),
}


def choose_packed_attention(
    wish: Literal["auto", "reference", "sdpa", "segments", "fused"],
    *,
    precision: Literal["fp32", "bf16", "fp16"],
    device: Literal["cpu", "cuda"] | None = None,
    head_dim: int | None = None,
) -> PackedAttention:
    """Return the implementation for a run.

    Args:    device: None: where this machine computes, a GPU if it has one. head_dim: of the model, if it is known.
    Raises:  ConfigError: the wish cannot be met.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = why_not_fused(device=device, head_dim=head_dim)
    if wish == "fused" and obstacle is not None:
        raise ConfigError(f"kernels.attention=fused cannot run: {obstacle}. Use auto.")
    if wish == "sdpa" and precision != "fp32":
        raise ConfigError(
            f"kernels.attention=sdpa needs precision=fp32, it is {precision}: torch would round the ALiBi bias to "
            f"{precision}. Use auto or reference."
        )
    if wish == "segments" and device == "cuda":
        raise ConfigError(
            "kernels.attention=segments is made for a CPU, and this run computes on a GPU: it would wait for the "
            "device in every step to learn the lengths of the segments. Use auto, reference or sdpa."
        )
    why = ""
    if wish != "auto":
        name: str = wish
    elif device == "cpu":
        name = "segments"
    elif obstacle is None:
        name = "fused"
    else:
        name, why = "sdpa" if precision == "fp32" else "reference", f", not fused: {obstacle}"
    logger.info("packed attention: %s%s", name, why)
    return _fused() if name == "fused" else IMPLEMENTATIONS[name]


def _fused() -> PackedAttention:
    """Import the Triton kernels, which a machine without Triton cannot."""
    fused = importlib.import_module("megatron_xmtf.kernels.packed_attention.fused")
    return PackedAttention("fused", fused.find_ranges, fused.packed_attention)
