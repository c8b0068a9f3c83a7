"""The training loop: one process a rank, the same on a laptop's CPU and on a cluster of GPUs.

for each step:  read micro-batches -> forward and backward through the pipeline -> update -> report
now and then:   validation loss, checkpoint

loss of the step = sum over the global batch of losses * loss_weights / sum of num_loss_units
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_xmtf.checkpoint.sharded import load_model_weights, load_training_state
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.loader import BatchLoader
from megatron_xmtf.errors import NonFiniteError
from megatron_xmtf.models.forward import MicroBatch, chunk_iterators, device_of, forward_chunk
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.topology import Topology, destroy_parallel, initialize_parallel
from megatron_xmtf.training.group_losses import GroupLosses
from megatron_xmtf.training.loss import micro_batch_loss
from megatron_xmtf.training.loss_scale import OverflowWatch
from megatron_xmtf.training.main_parameters import load_main_parameters
from megatron_xmtf.training.metrics import StepRates
from megatron_xmtf.training.optimizer import apply_settings, build_optimizer, set_learning_rate
from megatron_xmtf.training.prepare import PreparedRun, open_training_rows, open_validation_rows
from megatron_xmtf.training.profiling import StepProfiler
from megatron_xmtf.training.replica_check import check_replicas
from megatron_xmtf.training.run_log import RunLog
from megatron_xmtf.training.saving import RunCheckpoints
from megatron_xmtf.training.schedule import learning_rate
from megatron_xmtf.training.step_totals import largest_peak_memory_gib, step_totals
from megatron_xmtf.training.validation import validation_batches_by_name, validation_losses

__all__ = ["Trainer", "TrainingResult", "train_rank"]


class TrainingResult(TypedDict):
    """What a run hands back to its caller; the rest is in the run directory."""

    first_step: int
    last_step: int
    first_loss: float | None
    last_loss: float | None
    checkpoint: str | None
    """The checkpoint of the last step; None if there was nothing left to do."""


def train_rank(prepared: PreparedRun, store: torch.distributed.Store | None = None) -> TrainingResult:
    """Train in this process as one rank of the job; the target of `parallel.launch.run_ranks`.

    Args:    store: where the ranks of a launcher's job have met already; None: they meet now.
    Raises:  NonFiniteError: loss or gradient norm is NaN or Inf; no checkpoint is written from then on.
    """
    topology = initialize_parallel(prepared.config.parallel, seed=prepared.config.seed, store=store)
    try:
        return Trainer(prepared, topology).run()
    finally:
        destroy_parallel()


class Trainer:
    """One rank's part of a run."""

    def __init__(self, prepared: PreparedRun, topology: Topology) -> None:
        # what is trained, and where
        self.prepared, self.topology = prepared, topology
        self.config: RunConfig = prepared.config
        self.step = prepared.start.step
        # model and optimizer: weights are loaded before the optimizer copies them
        self.chunks = _build_chunks(prepared)
        verify = self.config.checkpoint.verify_hashes and not prepared.start.verified
        if not prepared.start.resumed:
            load_model_weights(self.chunks, prepared.start.checkpoint, verify=verify)
        self.optimizer = build_optimizer(self.config, self.chunks)
        self._connect_schedule()
        if prepared.start.resumed:
            load_training_state(self.chunks, self.optimizer, prepared.start.checkpoint, verify=verify)
            apply_settings(self.optimizer, self.config.optimizer)
        else:
            load_main_parameters(self.chunks, self.optimizer, prepared.start.checkpoint)
        self.checkpoints = RunCheckpoints(
            self.config,
            chunks=self.chunks,
            optimizer=self.optimizer,
            hf_files=prepared.hf_files,
            is_first=topology.rank == 0,
        )
        # data
        rows = open_training_rows(prepared)
        self.loader = BatchLoader(
            rows,
            micro_batch_size=self.config.batch.micro_batch_size,
            step_rows=self.config.batch.step_rows,
            data_parallel_rank=topology.dp_rank,
            data_parallel_size=topology.dp_size,
            normalization=self.config.loss.normalization,
        )
        measured = open_validation_rows(prepared) if self.config.evaluation.interval is not None else {}
        self.validation = validation_batches_by_name(self.config, measured)
        # what is seen of it
        self.group_losses = GroupLosses(rows.datasets)
        self.overflows = OverflowWatch(enabled=topology.rank == 0)
        self.rates = StepRates(
            prepared.architecture,
            sequence_length=self.config.batch.row_lengths,
            world_size=topology.world_size,
            precision=self.config.precision,
        )
        self.profiler = StepProfiler(
            self.config.logging.profile,
            directory=Path(self.config.output) / "profile",
            rank=topology.rank,
            resumed_step=self.step,
        )

    def run(self) -> TrainingResult:
        """Train to the last step."""
        config, first = self.config, self.step + 1
        losses: list[float] = []
        with RunLog(self.prepared, self.topology) as log, self.checkpoints:
            while self.step < config.train_steps:
                with self.profiler.step(self.step + 1):
                    metrics = self.train_step()
                losses.append(metrics["loss"])
                if self._due(config.logging.log_interval):
                    metrics.update(self.group_losses.report(device_of(self.chunks)))
                validation = self.validate() if self._due(config.evaluation.interval) else {}
                log.step(metrics, validation=validation)
                self.checkpoints.after_step(self.step, validation)
                if self._due(config.logging.replica_check_interval):
                    self.check_replicas()
                if self._due(config.checkpoint.save_interval) or self.step == config.train_steps:
                    self.save()
            checkpoint = self.checkpoints.finish()
        return TrainingResult(
            first_step=first,
            last_step=self.step,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            checkpoint=None if checkpoint is None else str(checkpoint),
        )

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step and return its metrics, the same on every rank.

        Raises:  NonFiniteError: on all ranks together.
        """
        started = time.monotonic()
        batches = self.loader.micro_batches(self.step)
        self.step += 1
        rate = learning_rate(self.config, self.step)
        set_learning_rate(self.optimizer, rate)
        reports = self.forward_backward(batches)
        loss_scale = float(self.optimizer.get_loss_scale()) if self.config.precision == "fp16" else None
        updated, grad_norm, _ = self.optimizer.step()
        device = device_of(self.chunks)
        loss, counts = step_totals(reports, batches, device=device)
        self.group_losses.finish_step()
        self.overflows.after_step(self.step, skipped=not updated, loss_scale=loss_scale)
        norm = None if grad_norm is None else float(grad_norm)
        if not math.isfinite(loss) or (updated and norm is not None and not math.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.step}: loss {loss}, gradient norm {norm}. No checkpoint is written; the last one is "
                "untouched. Lower optimizer.lr, or look at the rows of this step with `xmtf inspect`."
            )
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "rows": counts.rows,
            "examples": counts.examples,
            "tokens": counts.tokens,
            "target_tokens": counts.target_tokens,
            **self.rates.of(counts, seconds=time.monotonic() - started),
            "peak_memory_gib": largest_peak_memory_gib(device),
            "loss_scale": loss_scale,
            "skipped": not updated,
        }

    def forward_backward(self, batches: list[MicroBatch]) -> list[Tensor]:
        """Fill every `main_grad` with the gradient of the global batch's loss.

        Returns: on the last pipeline stage the report of each micro-batch (see `micro_batch_loss`), else nothing.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return list(
            get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=chunk_iterators(batches, self.chunks) if len(self.chunks) > 1 else iter(batches),
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=batches[0].pipeline_length,
                micro_batch_size=self.config.batch.micro_batch_size,
                forward_only=False,
            )
        )

    def validate(self) -> dict[str, float]:
        """Measure the validation losses."""
        with _parameters_gathered(self.chunks, self.config):
            return validation_losses(self.chunks, self.validation)

    def check_replicas(self) -> None:
        """Compare what several ranks hold; see `replica_check.py`."""
        with _parameters_gathered(self.chunks, self.config):
            check_replicas(self.chunks)

    def save(self) -> Path:
        """Save the current step; it is on the disk when `self.checkpoints` has finished it."""
        with _parameters_gathered(self.chunks, self.config):
            return self.checkpoints.save(self.step)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _connect_schedule(self) -> None:
        """Give Megatron-Core's schedules the functions of optimizer and gradient buffers that they call."""
        model_config = get_model_config(self.chunks[0])
        model_config.grad_scale_func = self.optimizer.scale_loss
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            model_config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    def _forward_step(self, batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        losses, batch = forward_chunk(batches, chunk)
        return losses, partial(self._weigh, batch)

    def _weigh(self, batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.group_losses.add(batch, losses)
        return micro_batch_loss(batch, losses)


def _build_chunks(prepared: PreparedRun) -> list[Any]:
    """Build this rank's chunks and wrap each in Megatron-Core's DistributedDataParallel."""
    config = prepared.config
    chunks = build_model(
        prepared.architecture,
        parallel=config.parallel,
        precision=config.precision,
        recompute=config.recompute,
        kernels=config.kernels,
        dropout=config.dropout,
        encoder_length=config.batch.encoder_length,
        decoder_length=config.batch.decoder_length,
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    return [
        DistributedDataParallel(
            config=get_model_config(chunk),
            ddp_config=ddp,
            module=chunk,
            # Later chunks have nothing to overlap their reduction with.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


@contextmanager
def _parameters_gathered(chunks: list[Any], config: RunConfig) -> Iterator[None]:
    """Gather all parameters before they are read outside the training step.

    With overlap_param_gather each layer's parameters are gathered when the next forward pass comes to it; a
    checkpoint written before that would hold the weights of the step before, without an error.
    """
    delayed = chunks if config.parallel.overlap_param_gather else []
    for chunk in delayed:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in delayed:
        chunk.enable_forward_pre_hook()
