"""The training loop: one process a rank, the same on a laptop's CPU and on a cluster of GPUs.

for each step:  read micro-batches -> forward and backward through the pipeline -> update -> report
now and then:   validation loss, checkpoint

loss of the step = sum over the global batch of losses * loss_weights / sum of num_loss_units
"""

from __future__ import annotations

import math
import os
import socket
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
from megatron_xmtf.errors import ExitCode, NonFiniteError, RankFailedError, XmtfError
from megatron_xmtf.models.forward import MicroBatch, chunk_iterators, device_of, forward_chunk
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.topology import Topology, destroy_parallel, initialize_parallel, world_size_from_environment
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
from megatron_xmtf.training.step_guard import StepGuard, check_finite_weights, has_bad_gradients
from megatron_xmtf.training.step_totals import agree, step_totals
from megatron_xmtf.training.stopping import StopCause, StopRequests
from megatron_xmtf.training.stragglers import StragglerWatch
from megatron_xmtf.training.validation import validation_batches_by_name, validation_losses
from megatron_xmtf.training.watchdog import STACKS, Watchdog

__all__ = ["Trainer", "TrainingResult", "train_rank"]


class TrainingResult(TypedDict):
    """What a run hands back to its caller; the rest is in the run directory."""

    first_step: int
    last_step: int
    first_loss: float | None
    last_loss: float | None
    checkpoint: str | None
    """The checkpoint of the last step; None if there was nothing left to do."""
    stopped_by: str | None
    """What stopped the run before its last step, in words; None: nothing did."""
    exit_code: int
    """0 done, or stopped by a stop file; 3: start the same command again."""


def train_rank(prepared: PreparedRun, store: torch.distributed.Store | None = None) -> TrainingResult:
    """Train in this process as one rank of the job; the target of `parallel.launch.run_ranks`.

    Args:    store: where the ranks of a launcher's job have met already; None: they meet now.
    Raises:  NonFiniteError: loss or gradient norm is NaN or Inf; no checkpoint is written from then on.
             RankFailedError: any error that is not an XmtfError, with this rank's host, step and phase.
    """
    config, rank = prepared.config, int(os.environ.get("RANK", "0"))
    directory, world_size = Path(config.output) / STACKS, world_size_from_environment()
    with Watchdog(config.watchdog, directory=directory, rank=rank, world_size=world_size) as watchdog:
        try:
            topology = initialize_parallel(config.parallel, seed=config.seed, store=store)
            return Trainer(prepared, topology, watchdog=watchdog).run()
        except XmtfError:
            raise
        except Exception as error:
            place = f"rank {rank} on {socket.gethostname()}, {watchdog.now}"
            raise RankFailedError(f"{type(error).__name__}: {error} ({place})") from error
        finally:
            destroy_parallel()


class Trainer:
    """One rank's part of a run."""

    def __init__(self, prepared: PreparedRun, topology: Topology, *, watchdog: Watchdog | None = None) -> None:
        # what is trained, and where
        self.prepared, self.topology = prepared, topology
        self.config: RunConfig = prepared.config
        self.step = prepared.start.step
        # model and optimizer: weights are loaded before the optimizer copies them
        self.chunks = _build_chunks(prepared)
        self.stragglers = StragglerWatch(
            topology,
            interval=self.config.logging.straggler_check_interval,
            ratio=self.config.logging.straggler_ratio,
        )
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
            prefix_lm=self.config.batch.prefix_lm,
        )
        measured = open_validation_rows(prepared) if self.config.evaluation.interval is not None else {}
        self.validation = validation_batches_by_name(self.config, measured)
        # what ends it early
        output = Path(self.config.output)
        self.watchdog = watchdog or Watchdog(
            self.config.watchdog, directory=output / STACKS, rank=topology.rank, world_size=topology.world_size
        )
        self.stop_requests = StopRequests(
            self.config.stop, output=output, started=prepared.started, reads_file=topology.rank == 0
        )
        self.stop_cause = StopCause.NONE
        self.guard = StepGuard(self.config.loss, output=output, resumed_step=self.step, datasets=rows.datasets)
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
        """Train to the last step, or to one where all ranks agree to stop."""
        config, first = self.config, self.step + 1
        losses: list[float] = []
        with self.stop_requests, RunLog(self.prepared, self.topology) as log, self.checkpoints:
            while self.step < config.train_steps and not self.stop_cause:
                with self.profiler.step(self.step + 1):
                    metrics = self.train_step()
                losses.append(metrics["loss"])
                if self._due(config.logging.log_interval):
                    metrics.update(self.group_losses.report(device_of(self.chunks)))
                validation = self.validate() if self._due(config.evaluation.interval) else {}
                log.step(metrics, validation=validation)
                self.checkpoints.after_step(self.step, validation)
                self.stragglers.after_step(self.step)
                if self._due(config.logging.replica_check_interval):
                    self.check_replicas()
                is_last = self.step == config.train_steps or bool(self.stop_cause)
                if self._due(config.checkpoint.save_interval) or is_last:
                    self.save()
            self.watchdog.phase("saving", step=self.step)
            checkpoint = self.checkpoints.finish()
        cause = self.stop_cause if self.step < config.train_steps else StopCause.NONE
        return TrainingResult(
            first_step=first,
            last_step=self.step,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            checkpoint=None if checkpoint is None else str(checkpoint),
            stopped_by=cause.words if cause else None,
            exit_code=int(cause.exit_code if cause else ExitCode.DONE),
        )

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step and return its metrics, the same on every rank.

        Raises:  NonFiniteError: on all ranks together.
        """
        started = time.monotonic()
        self.watchdog.phase("reading data", step=self.step + 1)
        batches = self.loader.micro_batches(self.step)
        self.step += 1
        rate = learning_rate(self.config, self.step)
        set_learning_rate(self.optimizer, rate)
        self.watchdog.phase("forward and backward", step=self.step)
        self.stragglers.begin()
        reports = self.forward_backward(batches)
        loss_scale = float(self.optimizer.get_loss_scale()) if self.config.precision == "fp16" else None
        device = device_of(self.chunks)
        loss, counts = step_totals(reports, batches, device=device)
        self.watchdog.phase("updating", step=self.step)
        # In fp16 gradients may overflow: the optimizer sees it, and the loss scale falls.
        bad_gradients = loss_scale is None and has_bad_gradients(self.chunks)
        agreed = agree(bad_gradients=bad_gradients, stop=self.stop_requests.now(), device=device)
        self.stop_cause = StopCause(agreed.stop)
        updated, norm = self._update(loss, batches, bad_gradients=agreed.bad_gradients)
        self.overflows.after_step(self.step, skipped=not updated and loss_scale is not None, loss_scale=loss_scale)
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
            "peak_memory_gib": agreed.peak_memory_gib,
            "loss_scale": loss_scale,
            "skipped": not updated,
        }

    def _update(self, loss: float, batches: list[MicroBatch], *, bad_gradients: bool) -> tuple[bool, float | None]:
        """Update unless the step is bad; return whether anything was updated, and the norm where it was computed."""
        reason = self.guard.reason(self.step, loss, bad_gradients=bad_gradients)
        if reason is not None:
            self.guard.pass_over(self.step, loss, reason, bad=self.group_losses.drop_step(), batches=batches)
            return False, None
        updated, grad_norm, _ = self.optimizer.step()
        self.group_losses.finish_step()
        norm = None if grad_norm is None else float(grad_norm)
        if updated and norm is not None and not math.isfinite(norm):
            # Every rank's gradients are finite, the sum of their squares is not: clipping has set them to 0.
            raise NonFiniteError(
                f"step {self.step}: loss {loss}, gradient norm {norm}. No checkpoint is written; the last one is "
                "untouched. Lower optimizer.lr, or look at the rows of this step with `xmtf inspect`."
            )
        return updated, norm

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
        self.watchdog.phase("validating", step=self.step)
        with _parameters_gathered(self.chunks, self.config):
            return validation_losses(self.chunks, self.validation)

    def check_replicas(self) -> None:
        """Compare what several ranks hold; see `replica_check.py`."""
        self.watchdog.phase("checking replicas", step=self.step)
        with _parameters_gathered(self.chunks, self.config):
            check_replicas(self.chunks)

    def save(self) -> Path:
        """Save the current step; it is on the disk when `self.checkpoints` has finished it.

        Raises:  NonFiniteError: on all ranks, a weight is NaN or Inf; and what `RunCheckpoints.save` raises.
        """
        self.watchdog.phase("saving", step=self.step)
        with _parameters_gathered(self.chunks, self.config):
            check_finite_weights(self.chunks, self.optimizer, step=self.step)
            return self.checkpoints.save(self.step)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _connect_schedule(self) -> None:
        """Give Megatron-Core's schedules the functions of optimizer and gradient buffers that they call."""
        model_config = get_model_config(self.chunks[0])
        model_config.grad_scale_func = self.optimizer.scale_loss
        finalize = model_config.finalize_model_grads_func

        def note_and_finalize(*arguments: Any, **keywords: Any) -> Any:
            self.stragglers.own_work_done()
            return finalize(*arguments, **keywords)

        model_config.finalize_model_grads_func = note_and_finalize
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            model_config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    def _forward_step(self, batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        self.watchdog.beat()
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
