"""The vocabulary projection: logits of every position, or the losses of those positions that have one.

    tokens            6    7    8    2    4    5    2        one row; inputs [6 7] and [4], targets [8 2] and [5 2]
    loss_weights      .   1/2  1/2   .   1/2  1/2   .
    loss_positions         1    2         4    5             the projection onto the vocabulary is done for these alone
    losses            0    l    l    0    l    l    0

With sequence parallelism the hidden states are gathered over the ranks first; each rank then takes the same positions.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmtf.kernels.head_loss import HeadLoss, VocabularyShard
from megatron_xmtf.models.architecture import Architecture

__all__ = ["VocabularyHead"]

PADDED_LOGIT = -60000.0
"""Logit of vocabulary rows that exist for divisibility alone: exp of it is 0 in fp32, fp16 can hold it (to -65504), and
-inf - -inf would be NaN."""


class VocabularyHead(tensor_parallel.ColumnParallelLinear):
    """Megatron-Core's column-parallel layer, with a loss; a module, so that its weight is awaited before it is used.

    Args:  architecture: whose vocabulary it is. has_weight: False where the embedding's own is given to each call.
           head_loss: the chosen kernel.
    """

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, *, has_weight: bool, head_loss: HeadLoss
    ) -> None:
        super().__init__(
            config.hidden_size,
            architecture.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=not has_weight,
        )
        self.head_loss = head_loss
        first = self.tp_group.rank() * self.output_size_per_partition
        count = max(0, min(self.output_size_per_partition, architecture.vocab_size - first))
        self.shard = VocabularyShard(
            first=first,
            count=count,
            group=self.tp_group if self.tp_group.size() > 1 else None,
            # The gather over the sequence, differentiated, sums over the ranks itself.
            reduces_hidden=not self.sequence_parallel,
            is_embedding=not has_weight,
        )

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Compute losses, or logits without labels.

        Args:    hidden: [s, b, h]; [s / tp, b, h] under sequence parallelism. weight: [vocab / tp, h].
                 labels: int64 [b, s]. positions: int64 [n], increasing, those of [s, b] flattened that have a loss,
                 the same on every tensor-parallel rank; None: all.
        Returns: fp32 losses [b, s], 0 at other positions; logits [b, s, vocab / tp] without labels.
        """
        if labels is None:
            logits, _ = super().forward(hidden, weight=weight)
            return self._without_padded_words(logits).transpose(0, 1).contiguous()
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        sequence, micro_batch, _ = hidden.shape
        chosen, chosen_labels = hidden.flatten(0, 1), labels.t().flatten()
        if positions is not None:
            chosen, chosen_labels = chosen.index_select(0, positions), chosen_labels.index_select(0, positions)
        losses = self.head_loss(chosen, weight, chosen_labels, shard=self.shard)
        if positions is not None:
            losses = losses.new_zeros(sequence * micro_batch).index_copy(0, positions, losses)
        return losses.view(sequence, micro_batch).t().contiguous()

    def _without_padded_words(self, logits: Tensor) -> Tensor:
        """Take all probability from the padded rows of the vocabulary; only the last ranks hold any.

        Args:    logits: [s, b, vocab / tp].
        """
        padded = logits.size(-1) - self.shard.count
        if not padded:
            return logits
        return torch.nn.functional.pad(logits[..., : self.shard.count], (0, padded), value=PADDED_LOGIT)
