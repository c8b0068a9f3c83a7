"""BLOOM on Megatron-Core's layers: ALiBi, LayerNorm after the embedding, output layer tied over the pipeline.

    tokens [b, s] -> embedding [s, b, h] -> LayerNorm -> num_layers x (attention, feed-forward) -> LayerNorm
           -> losses, or logits [s, b, vocab / tp], with the embedding's own weight (`head.py`)

Megatron-Core's fused QKV rows are [heads, 3, head_dim], the same as BLOOM's in `transformers`.
Source:  Le Scao et al. 2022, "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model", section 3.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_xmtf.kernels.bias_dropout_add import BiasDropoutAdd
from megatron_xmtf.kernels.head_loss import HeadLoss
from megatron_xmtf.kernels.packed_attention import PackedAttention
from megatron_xmtf.kernels.packed_attention.reference import alibi_slopes
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.models.attention import PackedCoreAttention
from megatron_xmtf.models.head import VocabularyHead
from megatron_xmtf.models.norm import LayerNorm
from megatron_xmtf.models.residual import bias_dropout_add_seam

__all__ = ["BloomModel"]


class BloomEmbedding(MegatronModule):
    """Vocabulary-parallel embedding followed by LayerNorm."""

    def __init__(self, config: TransformerConfig, architecture: BloomArchitecture) -> None:
        super().__init__(config=config)
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            architecture.padded_vocab_size,
            config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        self.layernorm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed.

        Args:    tokens: int64 [b, s].
        Returns: [s, b, h]; [s / tp, b, h] under sequence parallelism.
        """
        embedded = self.word_embeddings(tokens)
        if not self.config.sequence_parallel:
            embedded = embedded.transpose(0, 1).contiguous()
        normed: Tensor = self.layernorm(embedded)
        if not self.training or self.config.hidden_dropout == 0.0:
            return normed
        # Megatron's embedding dropout, with which BLOOMZ was trained; `transformers` has none. Under sequence
        # parallelism each rank holds other tokens and draws its own mask, otherwise all draw the same.
        with tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            return torch.nn.functional.dropout(normed, self.config.hidden_dropout)


class BloomModel(LanguageModule):
    """One pipeline stage (or virtual chunk) of a BLOOM.

    Args:  config: Megatron-Core's. architecture: the whole model. attention, head_loss, bias_dropout_add: the chosen
           kernels. pre_process: this chunk embeds. post_process: this chunk computes logits and losses.
           vp_stage: number of this chunk on its rank, None without a virtual pipeline.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: BloomArchitecture,
        *,
        attention: PackedAttention,
        head_loss: HeadLoss,
        bias_dropout_add: BiasDropoutAdd,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.architecture, self.attention = architecture, attention
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = True
        self.model_type = ModelType.encoder_or_decoder
        # No buffer: half precision would cast it, and 0.3 % of a slope is six tokens at the far end of 2,048.
        self.slopes = self._local_slopes()
        if pre_process:
            self.embedding = BloomEmbedding(config, architecture)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, attention, bias_dropout_add, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = VocabularyHead(config, architecture, has_weight=not pre_process, head_loss=head_loss)
        self.setup_embeddings_and_output_layer()

    def _local_slopes(self) -> Tensor:
        """Return the ALiBi slopes of this tensor-parallel rank's heads, fp32 [heads / tp]."""
        heads = self.architecture.num_attention_heads // self.config.tensor_model_parallel_size
        first = parallel_state.get_tensor_model_parallel_rank() * heads
        # No weight: it has values where the model itself is built on meta tensors.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return alibi_slopes(self.architecture.num_attention_heads)[first : first + heads]

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's hidden states; called by Megatron-Core's schedules."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def prepare_attention(self, segment_ids: Tensor, prefix_mask: Tensor | None) -> Any:
        """Return what the attention of every layer needs to know of the segments; int64 and bool [b, s]."""
        return self.attention.prepare(segment_ids, self.slopes, prefix_mask)

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor,
        labels: Tensor | None = None,
        loss_positions: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:    tokens, segment_ids: int64 [b, s]. labels: int64 [b, s], or None for logits.
                 loss_positions: int64 [n], of [s, b] flattened, where a loss is computed; None: everywhere.
                 prefix_mask: bool [b, s], inputs that all of their segment sees (prefix-LM); None: none.
        Returns: hidden states [s, b, h] on inner stages ([s / tp, b, h] under sequence parallelism); on the last
                 stage fp32 losses [b, s] with labels (0 where none is computed), logits [b, s, vocab / tp] without.
        """
        hidden = self.embedding(tokens) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            attention_bias=self.prepare_attention(segment_ids, prefix_mask),
        )
        if not self.post_process:
            return hidden
        output: Tensor = self.output_layer(hidden, self.shared_embedding_or_output_weight(), labels, loss_positions)
        return output


def block_spec(
    config: TransformerConfig, attention: PackedAttention, bias_dropout_add: BiasDropoutAdd, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Describe the layers of one chunk to Megatron-Core."""
    seam = bias_dropout_add_seam(bias_dropout_add)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=tensor_parallel.ColumnParallelLinear,
                    core_attention=partial(PackedCoreAttention, attention=attention),
                    linear_proj=tensor_parallel.RowParallelLinear,
                ),
            ),
            self_attn_bda=seam,
            pre_mlp_layernorm=LayerNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
                ),
            ),
            mlp_bda=seam,
        ),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=LayerNorm)
