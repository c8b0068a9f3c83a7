"""Build the part of a model that this rank holds, out of its architecture and the parallel sizes."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_xmtf.config.schema import DropoutConfig, KernelsConfig, ParallelConfig, RecomputeConfig
from megatron_xmtf.kernels.packed_attention import choose_packed_attention
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.models.bloom import BloomModel

__all__ = ["Precision", "build_model", "transformer_config"]

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(
    architecture: BloomArchitecture,
    *,
    parallel: ParallelConfig,
    precision: Precision = "fp32",
    recompute: RecomputeConfig | None = None,
    kernels: KernelsConfig | None = None,
    dropout: DropoutConfig | None = None,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks with uninitialised weights, on this rank's device.

    `initialize_parallel` must have run. Weights come from a checkpoint (`checkpoint.sharded`), never from here.

    Returns: one module per virtual pipeline chunk, so a list of one without a virtual pipeline.
    Raises:  ConfigError: the sizes do not divide the model.
    """
    architecture.check_split(parallel)
    config = transformer_config(
        architecture, parallel=parallel, precision=precision, recompute=recompute, dropout=dropout
    )
    attention = choose_packed_attention((kernels or KernelsConfig()).attention, precision=precision)
    chunk_count = parallel.virtual_pipeline_model_parallel_size
    chunks: list[torch.nn.Module] = []
    for vp_stage in [None] if chunk_count is None else range(chunk_count):
        chunk = BloomModel(
            config,
            architecture,
            attention=attention,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        _mark_tensor_parallel_parameters(chunk)
        chunks.append(chunk if precision == "fp32" else Float16Module(config, chunk))
    return chunks


def _mark_tensor_parallel_parameters(chunk: torch.nn.Module) -> None:
    """Mark the parameters that each tensor-parallel rank holds a part of.

    Megatron-Core marks them while it draws their first values, which is turned off here. An unmarked one counts as a
    copy, and the gradient norm, hence clipping, would see the part of the first rank alone.
    """
    for module in chunk.modules():
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            weight, split_dimension = module.weight, 1 if isinstance(module, RowParallelLinear) else 0
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, split_dimension, 1)


def transformer_config(
    architecture: BloomArchitecture,
    *,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig | None = None,
    dropout: DropoutConfig | None = None,
) -> TransformerConfig:
    """Translate our names into Megatron-Core's TransformerConfig."""
    recompute, dropout = recompute or RecomputeConfig(), dropout or DropoutConfig()
    hidden_dropout, attention_dropout = dropout.hidden_dropout, dropout.attention_dropout
    full = recompute.granularity == "full"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        layernorm_epsilon=architecture.layernorm_epsilon,
        hidden_dropout=architecture.hidden_dropout if hidden_dropout is None else hidden_dropout,
        attention_dropout=architecture.attention_dropout if attention_dropout is None else attention_dropout,
        # The tanh form is BLOOM's own; the constants are the same as in `transformers` BloomGelu.
        activation_func=partial(torch.nn.functional.gelu, approximate="tanh"),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        attention_softmax_in_fp32=True,
        # Weights come from a checkpoint; drawing random ones first would be wasted time at any size.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # gloo matches messages by posting order: batched point-to-point between the same two ranks swaps activation
        # and gradient without an error when a virtual pipeline makes both neighbours one rank.
        batch_p2p_comm=torch.cuda.is_available(),
        # These fusions need apex or go through torch.compile.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        # The loss function returns sum and divisor; Megatron-Core divides by the global batch's total.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        recompute_granularity=None if recompute.granularity == "none" else recompute.granularity,
        recompute_method=recompute.method if full else None,
        recompute_num_layers=recompute.num_layers if full else None,
    )
