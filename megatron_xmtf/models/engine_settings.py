"""Translate our names into Megatron-Core's TransformerConfig, for each family."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_xmtf.config.schema import DropoutConfig, KernelsConfig, ParallelConfig, RecomputeConfig
from megatron_xmtf.kernels.activation import choose_activation
from megatron_xmtf.kernels.weight_gradient import choose_weight_gradient
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture, EncoderDecoderArchitecture

__all__ = ["DTYPES", "Precision", "transformer_config"]

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(
    architecture: Architecture,
    *,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig | None = None,
    dropout: DropoutConfig | None = None,
    kernels: KernelsConfig | None = None,
) -> TransformerConfig:
    """Return the settings of a model of any family."""
    recompute, dropout = recompute or RecomputeConfig(), dropout or DropoutConfig()
    kernels = kernels or KernelsConfig()
    engine = _engine_settings(parallel, precision, kernels)
    if isinstance(architecture, BloomArchitecture):
        return _bloom_config(architecture, engine, parallel, recompute, dropout, kernels)
    return _encoder_decoder_config(architecture, engine, parallel, dropout, kernels)


def _bloom_config(
    architecture: BloomArchitecture,
    engine: dict[str, Any],
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dropout: DropoutConfig,
    kernels: KernelsConfig,
) -> TransformerConfig:
    hidden_dropout, attention_dropout = dropout.hidden_dropout, dropout.attention_dropout
    full = recompute.granularity == "full"
    return TransformerConfig(
        **engine,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        layernorm_epsilon=architecture.layernorm_epsilon,
        hidden_dropout=architecture.hidden_dropout if hidden_dropout is None else hidden_dropout,
        attention_dropout=architecture.attention_dropout if attention_dropout is None else attention_dropout,
        **_activation(kernels, feed_forward="gelu", has_fused=True),
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        recompute_granularity=None if recompute.granularity == "none" else recompute.granularity,
        recompute_method=recompute.method if full else None,
        recompute_num_layers=recompute.num_layers if full else None,
    )


def _encoder_decoder_config(
    architecture: EncoderDecoderArchitecture,
    engine: dict[str, Any],
    parallel: ParallelConfig,
    dropout: DropoutConfig,
    kernels: KernelsConfig,
) -> TransformerConfig:
    """Leave recomputation out: the model's own loop does it, and its attention."""
    hidden_dropout, attention_dropout = dropout.hidden_dropout, dropout.attention_dropout
    config = TransformerConfig(
        **engine,
        # One layer a chunk for Megatron-Core's counting, which knows one stack; `stages.py` says where layers are.
        num_layers=parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1),
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.layernorm_epsilon,
        hidden_dropout=architecture.dropout if hidden_dropout is None else hidden_dropout,
        attention_dropout=architecture.dropout if attention_dropout is None else attention_dropout,
        add_bias_linear=architecture.linear_bias,
        gated_linear_unit=architecture.gated,
        **_activation(
            kernels, feed_forward=architecture.feed_forward, has_fused=architecture.gated or architecture.linear_bias
        ),
    )
    # Sums the gradients of `pipeline_parallel` parameters over the stages: the tables of relative positions.
    config.has_cond_embedder = architecture.positions == "relative"
    return config


def _activation(kernels: KernelsConfig, *, feed_forward: str, has_fused: bool) -> dict[str, Any]:
    """Return the activation of the feed-forward layer, ReLU or tanh-GELU, and whether its bias is fused with it.

    Args:  has_fused: Megatron-Core has a fused one: gated, or with a bias.
    """
    if feed_forward == "relu":
        choose_activation(kernels.activation, is_tanh_gelu=False)
        return {"activation_func": torch.nn.functional.relu, "bias_activation_fusion": False}
    if choose_activation(kernels.activation, is_tanh_gelu=has_fused) == "megatron_core":
        # The name by which Megatron-Core knows its fused tanh form.
        return {"activation_func": torch.nn.functional.gelu, "bias_activation_fusion": True}
    # The tanh form is BLOOM's own; the constants are the same as in `transformers` BloomGelu.
    tanh_gelu = partial(torch.nn.functional.gelu, approximate="tanh")
    return {"activation_func": tanh_gelu, "bias_activation_fusion": False}


def _engine_settings(parallel: ParallelConfig, precision: Precision, kernels: KernelsConfig) -> dict[str, Any]:
    """Return what does not depend on the family."""
    weight_gradient = choose_weight_gradient(kernels.weight_gradient, has_cuda=torch.cuda.is_available())
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": DTYPES[precision],
        "pipeline_dtype": DTYPES[precision],
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "attention_softmax_in_fp32": True,
        # Weights come from a checkpoint; drawing random ones first would be wasted time at any size.
        "perform_initialization": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # gloo matches messages by posting order: batched point-to-point between the same two ranks swaps activation
        # and gradient without an error when a virtual pipeline makes both neighbours one rank.
        "batch_p2p_comm": torch.cuda.is_available(),
        "gradient_accumulation_fusion": weight_gradient == "apex",
        # Of Megatron-Core's own attention, which no model here has.
        "masked_softmax_fusion": False,
        # Read by nobody: `models/residual.py` has what was chosen.
        "bias_dropout_fusion": False,
        # The loss function returns sum and divisor; Megatron-Core divides by the global batch's total.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
    }
