"""Choose who computes the head's loss, once, and say which.

kernels.head_loss   device   bytes moved a logit, forward and backward, beside the products
reference           any      64, plain torch, all of them held at once
chunked             any      64, plain torch                              auto on a CPU
fused               cuda     6, Triton                                    auto on a GPU where Triton can run
"""

from __future__ import annotations

import importlib
import logging
from typing import Literal, Protocol

from torch import Tensor

from megatron_xmtf.kernels.head_loss import chunked, reference
from megatron_xmtf.kernels.head_loss.chunked import VocabularyShard
from megatron_xmtf.kernels.segment_attention.available import fused_or

__all__ = ["HeadLoss", "choose_head_loss"]

logger = logging.getLogger(__name__)


class HeadLoss(Protocol):
    """Cross-entropy of each position over a split vocabulary; see `chunked.head_loss`."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        shard: VocabularyShard,
        logits_at_once: int | None = None,
    ) -> Tensor:
        """Return losses, fp32 [n]."""


def choose_head_loss(
    wish: Literal["auto", "reference", "chunked", "fused"], *, device: Literal["cpu", "cuda"] | None = None
) -> HeadLoss:
    """Return the implementation for a run.

    Args:    device: None: where this machine computes, a GPU if it has one.
    Raises:  ConfigError: the wish cannot be met.
    """
    name, why = fused_or("chunked", wish=wish, key="head_loss", device=device)
    logger.info("head and loss: %s%s", name, f", not fused: {why}" if why else "")
    if name != "fused":
        return chunked.head_loss if name == "chunked" else reference.head_loss
    fused: HeadLoss = importlib.import_module("megatron_xmtf.kernels.head_loss.fused").head_loss
    return fused
