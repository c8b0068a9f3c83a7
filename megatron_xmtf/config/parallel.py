"""Keys of `parallel`, `batch`, `recompute` and `kernels`: how a step is cut and computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_xmtf.config.section import PositiveInt, Section

__all__ = ["BatchConfig", "KernelsConfig", "ParallelConfig", "RecomputeConfig"]


class ParallelConfig(Section):
    """How the model is split over ranks; the data-parallel size follows from the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline stage (interleaved schedule). None: one chunk, plain 1F1B."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer of the first stage. BLOOM-176B: 70 layers + embedding + head = 72 stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and its loss as one layer of the last stage."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers of the first stage; the others share the rest evenly. Not with the two settings above."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """The same of the last stage."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence; needs tp > 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the two settings above."""
    distributed_timeout_minutes: PositiveInt = 10
    """A collective that waits longer than this ends the run."""

    @model_validator(mode="after")
    def _one_split(self) -> ParallelConfig:
        counted = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        given = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        uneven = [key for key in counted + given if getattr(self, key)]
        if uneven and self.pipeline_model_parallel_size == 1:
            raise ValueError(f"{uneven[0]} needs pipeline_model_parallel_size > 1; it is 1")
        if any(key in counted for key in uneven) and any(key in given for key in uneven):
            raise ValueError(f"{uneven[0]} and {uneven[-1]} cannot be combined: layers are counted or given")
        return self


class BatchConfig(Section):
    """Sizes of batches, in packed rows."""

    micro_batch_size: PositiveInt = 1
    """Rows in one forward pass of one data-parallel rank. 1: BLOOMZ-176B."""
    global_batch_size: PositiveInt = 2048
    """Rows per optimizer step over all data-parallel ranks. 2048: BLOOMZ from 1b7 up."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 2048
    """Tokens of a row that the model reads; a row holds one more, the label of the last. 2048: BLOOMZ."""


class RecomputeConfig(Section):
    """Which activations are computed again in the backward pass to save memory."""

    granularity: Literal["none", "selective", "full"] = "none"
    """none; selective: attention scores; full: whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """For full: uniform groups of layers, or the first `num_layers` of each stage."""
    num_layers: PositiveInt = 1
    """For full: layers per group (uniform) or per stage (block)."""


class KernelsConfig(Section):
    """Which implementation of each operation runs; decided once at start and printed."""

    attention: Literal["auto", "reference", "sdpa"] = "auto"
    """Packed ALiBi attention. auto: sdpa in fp32, reference in half precision."""
