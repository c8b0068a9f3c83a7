"""The language-model head and its loss in plain torch, all logits at once: the oracle of the chunked one.

hidden [n, h], weight [vocab, h]  ->  logits [n, vocab]  ->  losses [n] = logsumexp(logits) - logits[label]

Where the vocabulary is split over ranks, Megatron-Core's own cross-entropy takes the place of torch's.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_xmtf.kernels.head_loss.chunked import VocabularyShard

__all__ = ["head_loss"]

NO_WORD = -60000.0
"""Logit of rows that only pad the vocabulary: exp of it is 0 in fp32."""


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard | None = None,
    logits_at_once: int | None = None,
) -> Tensor:
    """Return the cross-entropy of each position, fp32 [n] (fp64 for fp64); all logits are held at once.

    Args:    hidden: [n, h]. weight: [vocab, h] or, of a split vocabulary, this rank's rows. labels: int64 [n].
             shard: None: every row of the weight is a word, and this rank has all. logits_at_once: left unread.
    """
    shard = shard or VocabularyShard(first=0, count=len(weight))
    if shard.group is None:
        logits = hidden @ weight[: shard.count].t()
        wide = torch.promote_types(logits.dtype, torch.float32)
        return torch.nn.functional.cross_entropy(logits.to(wide), labels, reduction="none")
    if shard.reduces_hidden:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    logits = (hidden @ weight.t()).float()
    is_padding = torch.arange(len(weight), device=weight.device) >= shard.count
    losses: Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits.masked_fill(is_padding, NO_WORD), labels)
    return losses
