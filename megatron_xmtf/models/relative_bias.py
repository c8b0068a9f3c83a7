"""The two tables of relative positions, and how their copies on all pipeline stages stay the same.

    stage 0 (encoder)       encoder table used        decoder table there, unused
    stage 1 (both)          used                      used
    stage 2 (decoder)       there, unused             used
    after the backward pass Megatron-Core sums the gradients of each table over the stages, and all update alike

One table serves all layers of its stack, so every stage that holds such layers needs it. Every chunk holds both, used
or not, for Megatron-Core's own reduction of embedders that all stages hold (`has_cond_embedder`, `pipeline_parallel`)
flattens them into one tensor. What goes wrong without it is in tests/models/test_encoder_decoder_traps.py:

    sum over the stages             copies drift apart from the first step
    zeros for unused tables         overlap_grad_reduce waits for their gradients, and dies in the second step;
                                    overlap_param_gather starts to gather them, and never finishes
    a gradient bucket of their own  the distributed optimizer shards copies differently, and sums parts of other numbers
    `shared` on all but one         the gradient norm counts each copy, hence clipping is too strong
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_xmtf.kernels.relative_attention.buckets import bias_by_distance
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["RelativeBias", "give_unused_table_zeros"]


class RelativeBias(MegatronModule):
    """The table of one stack: [num_buckets, heads / tp].

    Args:  bidirectional: of the encoder. copy: number of this chunk in the order of the pipeline.
    """

    def __init__(
        self, config: TransformerConfig, architecture: EncoderDecoderArchitecture, *, bidirectional: bool, copy: int
    ) -> None:
        super().__init__(config=config)
        self.bidirectional, self.copy = bidirectional, copy
        self.max_distance = architecture.relative_attention_max_distance
        heads = architecture.num_attention_heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(
            torch.empty(architecture.relative_attention_num_buckets, heads, dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        if config.pipeline_model_parallel_size > 1:
            self.weight.pipeline_parallel = True  # type: ignore[attr-defined]
            self.weight.shared_embedding = True  # type: ignore[attr-defined]
            self.weight.shared = copy > 0  # type: ignore[attr-defined]

    def forward(self, length: int) -> Tensor:
        """Return the bias of every distance in segments of up to `length` tokens, fp32 [heads / tp, 2 length - 1]."""
        return bias_by_distance(
            self.weight, length=length, bidirectional=self.bidirectional, max_distance=self.max_distance
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the table to checkpoints: split over heads, the first chunk's copy is the one that is written."""
        key = f"{prefix}weight"
        replica = (self.copy, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        return {key: make_tp_sharded_tensor_for_checkpoint(self.weight, key, tp_axis=1, replica_id=replica)}


class _ZeroGradients(torch.autograd.Function):
    """Hand hidden states through; in the backward pass, give a bias a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        ctx.shape = bias.shape
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.zeros(ctx.shape, dtype=torch.float32, device=gradients[0].device)


def give_unused_table_zeros(hidden: Tensor, table: RelativeBias) -> Tensor:
    """Return `hidden`; the table is looked up once, and gets a gradient of zeros in the backward pass.

    The lookup is what overlap_param_gather waits with for the table's new values, the gradient what
    overlap_grad_reduce waits for.
    """
    result: Tensor = _ZeroGradients.apply(hidden, table(1))
    return result
