"""The language-model head and its loss in plain torch, for one process: the oracle of the chunked one.

hidden [n, h], weight [vocab, h]  ->  logits [n, vocab]  ->  losses [n] = logsumexp(logits) - logits[label]
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["head_loss"]


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position, fp32 [n]; all logits are held at once.

    Args:    hidden: [n, h]. weight: [vocab, h], without the rows that only pad the vocabulary. labels: int64 [n].
    """
    logits = hidden @ weight.t()
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
