"""One way to run a model on a cluster: sizes of the parallel groups, micro-batch, what is recomputed, which engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_xmtf.config.parallel import ParallelConfig, RecomputeConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.planning.engine import MEGATRON_CORE, Engine

__all__ = ["AttentionKind", "HeadKind", "Layout", "ResidualKind", "attention_of", "check_batch", "head_of", "layout_of"]

AttentionKind = Literal["unfused", "reference", "sdpa", "fused"]
"""unfused: Megatron's fused softmax between two products, scores in half precision (the published rows). reference: our
readable one, scores in fp32. sdpa: torch's, with a dense fp32 bias. fused: no scores in memory."""
HeadKind = Literal["reference", "chunked", "fused"]
"""What is done to logits around the products: in plain torch, or in two Triton kernels."""
ResidualKind = Literal["reference", "fused"]
"""How a layer's output is added to its residual: in plain torch, which keeps dropout's mask, or in one kernel."""


@dataclass(frozen=True)
class Layout:
    """A layout, complete: memory, time and communication are functions of it, the model and the cluster."""

    gpus: int
    parallel: ParallelConfig
    lengths: RowLengths
    micro_batch_size: int
    global_batch_size: int
    recompute: RecomputeConfig = RecomputeConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    offloads_optimizer: bool = False
    attention: AttentionKind = "reference"
    head: HeadKind = "fused"
    dropout: bool = False
    residual: ResidualKind = "reference"
    loss_fraction: float = 1.0
    """Part of the positions that have a loss: the output layer is computed for these alone."""
    fuses_weight_gradient: bool = False
    """Gradients are added within the matrix product (apex)."""
    engine: Engine = MEGATRON_CORE

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def vpp(self) -> int:
        """Model chunks a stage."""
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.gpus // (self.tp * self.pp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def number_bytes(self) -> int:
        """Bytes of an activation or a weight."""
        return 4 if self.precision == "fp32" else 2

    @property
    def shards_optimizer(self) -> bool:
        """Whether data-parallel ranks share the optimizer's state."""
        return self.engine.always_sharded or self.parallel.use_distributed_optimizer

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens of a row: (encoder, decoder); a decoder-only model has no encoder."""
        if isinstance(self.lengths, EncoderDecoderLengths):
            return self.lengths.encoder_length, self.lengths.decoder_length
        return 0, self.lengths

    @property
    def words(self) -> str:
        """The layout in a few signs: TP4 PP12 DP8 MBS2, full."""
        virtual = f" VPP{self.vpp}" if self.vpp > 1 else ""
        split = " SP" if self.parallel.sequence_parallel else ""
        return (
            f"TP{self.tp}{split} PP{self.pp}{virtual} DP{self.dp} MBS{self.micro_batch_size}, "
            f"recompute {self.recompute.granularity}"
        )


def attention_of(config: RunConfig) -> AttentionKind:
    """Say what `kernels.attention` means for memory and time on a GPU; `choose_packed_attention` chooses the same."""
    kinds: dict[str, AttentionKind] = {"reference": "reference", "sdpa": "sdpa"}
    return kinds.get(config.kernels.attention, "fused")


def head_of(config: RunConfig) -> HeadKind:
    """Say what `kernels.head_loss` means on a GPU; `choose_head_loss` chooses the same."""
    return "fused" if config.kernels.head_loss == "auto" else config.kernels.head_loss


def check_batch(*, global_batch_size: int, micro_batch_size: int, dp: int) -> None:
    """Check that every data-parallel rank gets whole micro-batches.

    Raises:  ConfigError: names the values and the two nearest sizes that do.
    """
    share = micro_batch_size * dp
    if global_batch_size % share:
        below = global_batch_size // share * share
        raise ConfigError(
            f"batch.global_batch_size={global_batch_size} is not a multiple of micro_batch_size x data-parallel size = "
            f"{micro_batch_size} x {dp}; use {f'{below} or ' if below else ''}{below + share}."
        )


def layout_of(config: RunConfig, *, gpus: int, loss_fraction: float, attention: AttentionKind | None = None) -> Layout:
    """Return the layout that a run's configuration asks for.

    Raises:  ConfigError: the GPUs are no multiple of tp x pp, the batch no multiple of micro-batch x dp.
    """
    parallel, batch = config.parallel, config.batch
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if gpus % (tp * pp):
        below = gpus // (tp * pp) * tp * pp
        raise ConfigError(
            f"{gpus} GPUs are not a multiple of tensor_model_parallel_size x pipeline_model_parallel_size = {tp} x "
            f"{pp}; use {f'{below} or ' if below else ''}{below + tp * pp}, or let --search find a layout."
        )
    check_batch(
        global_batch_size=batch.global_batch_size, micro_batch_size=batch.micro_batch_size, dp=gpus // (tp * pp)
    )
    return base_layout(config, gpus=gpus, loss_fraction=loss_fraction, attention=attention)


def base_layout(
    config: RunConfig, *, gpus: int, loss_fraction: float, attention: AttentionKind | None = None
) -> Layout:
    """Return a run's layout without checking that it divides; a search replaces the sizes."""
    dropout = config.dropout
    return Layout(
        gpus=gpus,
        parallel=config.parallel,
        lengths=config.batch.row_lengths,
        micro_batch_size=config.batch.micro_batch_size,
        global_batch_size=config.batch.global_batch_size,
        recompute=config.recompute,
        precision=config.precision,
        optimizer=config.optimizer.name,
        offloads_optimizer=config.optimizer.offload == "cpu",
        attention=attention or attention_of(config),
        head=head_of(config),
        dropout=bool(dropout.hidden_dropout or dropout.attention_dropout),
        residual="reference" if config.kernels.bias_dropout_add == "reference" else "fused",
        loss_fraction=loss_fraction,
        fuses_weight_gradient=config.kernels.weight_gradient == "apex",
    )
