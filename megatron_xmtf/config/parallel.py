"""Keys of `parallel`, `batch`, `recompute` and `kernels`: how a step is cut and computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.config.section import PositiveInt, Section
from megatron_xmtf.config.step_rows import StepRows

__all__ = ["BatchConfig", "KernelsConfig", "ParallelConfig", "RampupConfig", "RecomputeConfig"]

COUNTED_KEYS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
GIVEN_KEYS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
"""Two ways in which a decoder model's layers are split unevenly."""


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
    pipeline_layers: list[Annotated[int, Field(ge=0, strict=True)]] | None = None
    """Of an encoder-decoder: layers of each stage in order, encoder layers first; with a virtual pipeline one number a
    chunk, those of chunk 0 of all stages first. None: cut where the dearest stage is cheapest (`models/stages.py`)."""
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
        uneven = self.uneven_keys
        if uneven and self.pipeline_model_parallel_size == 1:
            raise ValueError(f"{uneven[0]} needs pipeline_model_parallel_size > 1; it is 1")
        if any(key in COUNTED_KEYS for key in uneven) and any(key in GIVEN_KEYS for key in uneven):
            raise ValueError(f"{uneven[0]} and {uneven[-1]} cannot be combined: layers are counted or given")
        chunks = self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)
        if self.pipeline_layers is not None and len(self.pipeline_layers) != chunks:
            raise ValueError(
                f"pipeline_layers has {len(self.pipeline_layers)} numbers, pipeline_model_parallel_size x "
                f"virtual_pipeline_model_parallel_size = {chunks} parts need one each"
            )
        return self

    @property
    def uneven_keys(self) -> list[str]:
        """Keys that are set and say how a decoder model's layers are split."""
        return [key for key in COUNTED_KEYS + GIVEN_KEYS if getattr(self, key)]


class RampupConfig(Section):
    """Global batches that grow from a small one in equal increments."""

    start: PositiveInt
    """Rows of the first steps. 192: BLOOM-176B's pretraining, which ramped `192 16 9_765_625` to 2048 (tr11)."""
    increment: PositiveInt
    """Rows by which a step grows each time; `global_batch_size` - `start` is a multiple of it."""
    rows: PositiveInt
    """Rows over which the batch grows, in increments of the same number of rows each."""


class BatchConfig(Section):
    """Sizes of batches, in packed rows."""

    micro_batch_size: PositiveInt = 1
    """Rows in one forward pass of one data-parallel rank. 1: BLOOMZ-176B."""
    global_batch_size: PositiveInt = 2048
    """Rows per optimizer step over all data-parallel ranks. 2048: BLOOMZ from 1b7 up."""
    rampup_batch_size: RampupConfig | None = None
    """Begin with smaller global batches, as Megatron's `--rampup-batch-size`. None: BLOOMZ."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 2048
    """Tokens of a row that the model reads; a row holds one more, the label of the last. 2048: BLOOMZ. Not to be given
    with the two keys below, whose sum it then is."""
    encoder_length: Annotated[int, Field(ge=8, strict=True)] | None = None
    """Tokens of a row that an encoder-decoder's encoder reads: inputs of several examples. 1024: mT0, AlexaTM."""
    decoder_length: Annotated[int, Field(ge=8, strict=True)] | None = None
    """Tokens of a row that its decoder reads: targets of the same examples. 1024: mT0."""
    encoder_eos: bool = True
    """Whether the inputs of each example end with EOS on the encoder's side. true: T5, mT5 and Flan-T5, whose T5X tasks
    append EOS to inputs and targets alike. Without meaning for a decoder-only model."""
    prefix_lm: bool = False
    """Whether a decoder-only model reads the inputs of an example in both directions: all of them are seen by each of
    them, while targets, and texts without inputs, stay causal. Evaluation and generation from the checkpoint do the
    same; `transformers` cannot. false: BLOOMZ, whose trainer (Megatron-DeepSpeed) calls it `--prefixlm`."""

    @model_validator(mode="before")
    @classmethod
    def _add_two_sides(cls, values: Any) -> Any:
        """Make `sequence_length` of two sides their sum, also when a resolved configuration says so already."""
        if not isinstance(values, dict):
            return values
        encoder, decoder = values.get("encoder_length"), values.get("decoder_length")
        if (encoder is None) != (decoder is None):
            given, missing = ("encoder", "decoder") if decoder is None else ("decoder", "encoder")
            raise ValueError(
                f"batch.{given}_length is set, batch.{missing}_length is not; an encoder-decoder needs both"
            )
        # Other types are refused field by field.
        if not (isinstance(encoder, int) and isinstance(decoder, int)):
            return values
        if values.get("sequence_length", encoder + decoder) != encoder + decoder:
            raise ValueError(
                f"batch.sequence_length={values['sequence_length']} has no meaning beside "
                f"batch.encoder_length={encoder} and batch.decoder_length={decoder}; leave it out"
            )
        return {**values, "sequence_length": encoder + decoder}

    @model_validator(mode="after")
    def _prefix_lm_of_one_line(self) -> BatchConfig:
        if self.prefix_lm and self.encoder_length is not None:
            raise ValueError(
                f"batch.prefix_lm=true is for decoder-only models, and batch.encoder_length={self.encoder_length} is "
                "of an encoder-decoder, whose encoder reads inputs in both directions anyway; leave prefix_lm out"
            )
        return self

    @model_validator(mode="after")
    def _rampup_reaches_global_batch(self) -> BatchConfig:
        ramp = self.rampup_batch_size
        if ramp is None:
            return self
        growth = self.global_batch_size - ramp.start
        if growth <= 0:
            raise ValueError(
                f"batch.rampup_batch_size.start={ramp.start} must be less than "
                f"batch.global_batch_size={self.global_batch_size}; without a ramp leave rampup_batch_size out"
            )
        if growth % ramp.increment:
            raise ValueError(
                f"batch.rampup_batch_size grows from {ramp.start} to batch.global_batch_size={self.global_batch_size}, "
                f"by {growth}, which is not a multiple of increment={ramp.increment}"
            )
        return self

    @property
    def row_lengths(self) -> RowLengths:
        """Tokens of a row: `sequence_length`, or both sides of an encoder-decoder's."""
        if self.encoder_length is None or self.decoder_length is None:
            return self.sequence_length
        return EncoderDecoderLengths(self.encoder_length, self.decoder_length, self.encoder_eos)

    @property
    def step_rows(self) -> StepRows:
        """Which rows each step reads."""
        ramp = self.rampup_batch_size
        if ramp is None:
            return StepRows(self.global_batch_size)
        return StepRows(self.global_batch_size, ramp.start, ramp.increment, ramp.rows)


class RecomputeConfig(Section):
    """Which activations are computed again in the backward pass to save memory."""

    granularity: Literal["none", "selective", "full"] = "none"
    """none; selective: attention scores; full: whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """For full: uniform groups of layers, or the first `num_layers` of each stage."""
    num_layers: PositiveInt = 1
    """For full: layers per group (uniform) or per stage (block)."""


class KernelsConfig(Section):
    """Which implementation of each operation runs; decided once at start and printed.

    Each is `auto`, `reference` (readable torch, the oracle of the others) or a name.
    """

    attention: Literal["auto", "reference", "sdpa", "segments", "fused"] = "auto"
    """Attention within the segments of packed rows. auto: on a CPU segments; on a GPU fused, our Triton kernels, or
    where Triton cannot run sdpa (decoder models in fp32) and reference."""
    head_loss: Literal["auto", "reference", "chunked", "fused"] = "auto"
    """Loss over the vocabulary. auto: on a GPU fused, where Triton can run; else chunked, plain torch. reference holds
    all logits of a micro-batch at once."""
    bias_dropout_add: Literal["auto", "reference", "fused"] = "auto"
    """What a layer adds to its residual: bias, dropout, sum. auto: on a GPU fused, one Triton kernel, where Triton can
    run; else plain torch."""
    activation: Literal["auto", "reference", "torch", "megatron_core"] = "auto"
    """Bias and tanh-GELU, plain or gated. auto: on a GPU Megatron-Core's compiled ones, where Triton can run; else
    torch, which is the reference."""
    adam: Literal["auto", "reference", "torch", "transformer_engine", "apex"] = "auto"
    """Whose AdamW. auto: on a GPU the first that can be imported of Transformer Engine and NVIDIA's apex, else torch's
    fused kernel. reference: torch's loop over parameters and operations. The checkpoints are the same."""
    weight_gradient: Literal["auto", "reference", "torch", "apex"] = "auto"
    """Who adds a weight's gradient to its fp32 main gradient. auto: on a GPU NVIDIA's apex, within the matrix product,
    if its extension can be imported; else torch, which is the reference."""
