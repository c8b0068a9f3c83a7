"""Build the part of a model that this rank holds, out of its architecture and the parallel sizes."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module

from megatron_xmtf.config.schema import DropoutConfig, KernelsConfig, ParallelConfig, RecomputeConfig
from megatron_xmtf.kernels.bias_dropout_add import choose_bias_dropout_add
from megatron_xmtf.kernels.head_loss import choose_head_loss
from megatron_xmtf.kernels.packed_attention import choose_packed_attention
from megatron_xmtf.kernels.relative_attention import choose_relative_attention
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.bloom import BloomModel
from megatron_xmtf.models.encoder_decoder import EncoderDecoderModel
from megatron_xmtf.models.encoder_decoder_layers import LayerSettings
from megatron_xmtf.models.engine_settings import DTYPES, Precision, transformer_config
from megatron_xmtf.models.stages import ChunkPlace, stage_layers

__all__ = ["DTYPES", "Precision", "build_model", "transformer_config"]


def build_model(
    architecture: Architecture,
    *,
    parallel: ParallelConfig,
    precision: Precision = "fp32",
    recompute: RecomputeConfig | None = None,
    kernels: KernelsConfig | None = None,
    dropout: DropoutConfig | None = None,
    encoder_length: int | None = None,
    decoder_length: int | None = None,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks with uninitialised weights, on this rank's device.

    `initialize_parallel` must have run. Weights come from a checkpoint (`checkpoint.sharded`), never from here.

    Args:    encoder_length, decoder_length: tokens of a row of an encoder-decoder, whose stages are cut by cost.
    Returns: one module per virtual pipeline chunk, so a list of one without a virtual pipeline.
    Raises:  ConfigError: the sizes do not divide the model.
    """
    architecture.check_split(parallel)
    recompute, kernels = recompute or RecomputeConfig(), kernels or KernelsConfig()
    config = transformer_config(
        architecture, parallel=parallel, precision=precision, recompute=recompute, dropout=dropout, kernels=kernels
    )
    head_loss = choose_head_loss(kernels.head_loss)
    bias_dropout_add = choose_bias_dropout_add(kernels.bias_dropout_add)
    chunks: list[torch.nn.Module]
    if isinstance(architecture, BloomArchitecture):
        attention = choose_packed_attention(kernels.attention, precision=precision, head_dim=architecture.head_dim)
        chunks = [
            BloomModel(
                config,
                architecture,
                attention=attention,
                head_loss=head_loss,
                bias_dropout_add=bias_dropout_add,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
            for vp_stage in _vp_stages(parallel)
        ]
    else:
        lengths = {"encoder_length": encoder_length, "decoder_length": decoder_length}
        settings = LayerSettings(
            attention=choose_relative_attention(kernels.attention, head_dim=architecture.head_dim),
            bias_dropout_add=bias_dropout_add,
            scale=architecture.head_dim**-0.5 if architecture.attention_scaling else 1.0,
            recompute=recompute.granularity == "selective",
        )
        chunks = [
            EncoderDecoderModel(
                config, architecture, settings=settings, head_loss=head_loss, place=place, recompute=recompute
            )
            for place in _chunk_places(stage_layers(architecture, parallel, **lengths), parallel)
        ]
    for chunk in chunks:
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        _mark_tensor_parallel_parameters(chunk)
    return chunks if precision == "fp32" else [Float16Module(config, chunk) for chunk in chunks]


def _vp_stages(parallel: ParallelConfig) -> list[int | None]:
    """Return the numbers of this rank's chunks, one None without a virtual pipeline."""
    chunks = parallel.virtual_pipeline_model_parallel_size
    return [None] if chunks is None else list(range(chunks))


def _chunk_places(split: list[list[range]], parallel: ParallelConfig) -> list[ChunkPlace]:
    """Return which part of an encoder-decoder each chunk of this rank is."""
    stages, rank = parallel.pipeline_model_parallel_size, parallel_state.get_pipeline_model_parallel_rank()
    return [
        ChunkPlace(
            layers=layers,
            pre_process=chunk == 0 and rank == 0,
            post_process=chunk == len(split[rank]) - 1 and rank == stages - 1,
            vp_stage=vp_stage,
            copy=chunk * stages + rank,
        )
        for chunk, (vp_stage, layers) in enumerate(zip(_vp_stages(parallel), split[rank], strict=True))
    ]


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
