"""Layers of an encoder-decoder out of Megatron-Core's parts: norms, attention seam, embedding, and the layers.

    encoder layer    h + attend(norm h)    h + feed_forward(norm h)
    decoder layer    h + attend(norm h)    h + attend across(norm h, encoder)    h + feed_forward(norm h)

Dropout stands where `transformers` T5 has it: embeddings, attention weights, inside the feed-forward layer, on what is
added to the residual, after the last norms.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_xmtf.kernels.bias_dropout_add import BiasDropoutAdd
from megatron_xmtf.kernels.relative_attention import RelativeAttention
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.norm import LayerNorm
from megatron_xmtf.models.residual import bias_dropout_add_seam

__all__ = ["LayerSettings", "RMSNorm", "TokenEmbedding", "build_layer", "norm_class", "own_dropout"]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, built as Megatron-Core builds norms, its weight marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_class(architecture: EncoderDecoderArchitecture) -> type[nn.Module]:
    """Return the norm of an architecture."""
    return RMSNorm if architecture.norm == "rms" else LayerNorm


@dataclass(frozen=True)
class LayerSettings:
    """What layers compute with, and how scores are made and kept; the same for all."""

    attention: RelativeAttention
    bias_dropout_add: BiasDropoutAdd
    scale: float
    """Of scores: head_dim^-0.5, or 1 for T5."""
    recompute: bool
    """Compute probabilities again in the backward pass."""


class SegmentCoreAttention(nn.Module):
    """Attention between projections: query [q, b, heads / tp, head_dim], key and value of k -> [q, b, heads d / tp].

    The mask is what the kernel's `prepare` made of the segments, the bias [heads / tp, 2 L - 1] by distance or None.
    Recomputation is the kernel's own: Megatron-Core's would close over the bias, and go through its graph twice.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        settings: LayerSettings,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.dropout = config.attention_dropout
        self.is_forked_already = config.sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        attention_bias: Tensor | None = None,
        attn_mask_type: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend within segments; see `kernels.relative_attention.reference`."""
        dropout = self.dropout if self.training else 0.0
        settings = self.settings
        with own_dropout(forked=dropout == 0.0 or self.is_forked_already):
            return settings.attention.attend(
                query,
                key,
                value,
                attention_bias,
                attention_mask,
                scale=settings.scale,
                dropout=dropout,
                recompute=settings.recompute,
            )


class DroppingRowParallelLinear(tensor_parallel.RowParallelLinear):
    """The second feed-forward layer, with dropout of its input; `transformers` drops the activations there."""

    def forward(self, input_: Tensor) -> Any:
        """Drop and project [s, b, columns / tp]."""
        dropout = self.config.hidden_dropout if self.training else 0.0
        if dropout > 0.0:
            with own_dropout(forked=self.config.sequence_parallel):
                input_ = nn.functional.dropout(input_, dropout)
        return super().forward(input_)


def own_dropout(*, forked: bool) -> AbstractContextManager[Any]:
    """Draw masks of this tensor-parallel rank's own; forked: they are already (see `models/attention.py`)."""
    return nullcontext() if forked else get_cuda_rng_tracker().fork()


class TokenEmbedding(MegatronModule):
    """Words, positions, or both, of one side or of both: int64 [b, s] -> [s, b, h].

    Under sequence parallelism each tensor-parallel rank gets its own part of the sequence.
    """

    def __init__(
        self, config: TransformerConfig, architecture: EncoderDecoderArchitecture, *, words: bool, positions: bool
    ) -> None:
        super().__init__(config=config)
        if words:
            self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
                architecture.padded_vocab_size,
                config.hidden_size,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
            )
        if positions:
            assert architecture.max_positions is not None, "an architecture with learned positions says how many"
            shape = (architecture.max_positions, config.hidden_size)
            self.position_embeddings = nn.Embedding(*shape, _weight=torch.empty(shape, dtype=config.params_dtype))

    def embed_words(self, tokens: Tensor) -> Tensor:
        """Look up words."""
        embedded: Tensor = self.word_embeddings(tokens)
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def embed_positions(self, position_ids: Tensor) -> Tensor:
        """Look up positions."""
        embedded: Tensor = self.position_embeddings(position_ids.t())
        if self.config.sequence_parallel:
            # Its backward pass gathers the gradient, so that every rank has that of the whole table.
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded)
        return embedded


def build_layer(
    config: TransformerConfig,
    architecture: EncoderDecoderArchitecture,
    settings: LayerSettings,
    *,
    crosses: bool,
    layer_number: int,
    vp_stage: int | None,
) -> TransformerLayer:
    """Build one layer; crosses: of the decoder, with cross-attention. layer_number: as Megatron-Core counts it."""
    norm = norm_class(architecture)
    core, column = partial(SegmentCoreAttention, settings=settings), tensor_parallel.ColumnParallelLinear
    row, seam = tensor_parallel.RowParallelLinear, bias_dropout_add_seam(settings.bias_dropout_add)
    across = ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=CrossAttentionSubmodules(linear_q=column, linear_kv=column, core_attention=core, linear_proj=row),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal if crosses else AttnMaskType.padding},
            submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=core, linear_proj=row),
        ),
        self_attn_bda=seam,
        pre_cross_attn_layernorm=norm if crosses else IdentityOp,
        cross_attention=across if crosses else IdentityOp,
        cross_attn_bda=seam if crosses else IdentityFuncOp,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=DroppingRowParallelLinear)),
        mlp_bda=seam,
    )
    return TransformerLayer(config, submodules, layer_number=layer_number, vp_stage=vp_stage)
