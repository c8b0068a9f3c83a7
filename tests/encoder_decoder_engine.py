"""An encoder-decoder, its gradient buffers and its optimizer inside one forked rank, on rows that are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.forward import chunk_iterators, forward_chunk
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.loss import global_batch_loss, micro_batch_loss
from megatron_xmtf.training.optimizer import build_optimizer, set_learning_rate
from tests.encoder_decoder import DECODER_LENGTH, ENCODER_LENGTH, set_weights, shards

LEARNING_RATE = 5e-4
Shard = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def run_config(**sections: Any) -> RunConfig:
    """Return a configuration whose files do not exist; only its numbers are used."""
    values = {
        "model": "none",
        "output": "none",
        "data": {"train": [{"prefix": "none"}]},
        "schedule": {"train_steps": 4},
        "precision": "fp32",
        "optimizer": {"lr": LEARNING_RATE},
        **sections,
    }
    return config_from_mapping(values, RunConfig, source="test")


@dataclass
class Engine:
    """What one rank trains with."""

    config: RunConfig
    chunks: list[Any]
    optimizer: MegatronOptimizer

    def forward_backward(self, batches: Sequence[EncoderDecoderBatch]) -> float:
        """Fill every `main_grad`; return the loss of the global batch, the same on all ranks."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        ranks, rank = (
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )
        own = list(batches)[rank::ranks]

        def step(iterator: Any, chunk: Any) -> tuple[Tensor, Any]:
            losses, batch = forward_chunk(iterator, chunk)
            return losses, partial(micro_batch_loss, batch)

        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=chunk_iterators(own, self.chunks) if len(self.chunks) > 1 else iter(own),
            model=self.chunks,
            num_microbatches=len(own),
            seq_length=ENCODER_LENGTH + DECODER_LENGTH,
            micro_batch_size=len(own[0].rows),
            forward_only=False,
        )
        total = global_batch_loss(reports) if reports else torch.zeros(2, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(total, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return float(total[0] / total[1])

    def train_step(self, batches: Sequence[EncoderDecoderBatch]) -> tuple[float, float]:
        """Do one update; return loss and gradient norm."""
        loss = self.forward_backward(batches)
        set_learning_rate(self.optimizer, LEARNING_RATE)
        _, norm, _ = self.optimizer.step()
        return loss, float(norm or 0.0)

    def gradients(self) -> list[Shard]:
        """Return the parts of all gradients that this rank holds."""
        found: list[Shard] = []
        for name, shape, offset, part, parameter in shards(self.chunks):
            begin = (part.data_ptr() - parameter.data_ptr()) // part.element_size()
            gradient = parameter.main_grad.reshape(-1)[begin : begin + part.numel()].view(part.shape)
            found.append((name, shape, offset, gradient.clone()))
        return found

    def weights(self) -> list[Shard]:
        """Return the parts of all weights that this rank holds."""
        return [(name, shape, offset, part.detach().clone()) for name, shape, offset, part, _ in shards(self.chunks)]


def start_engine(
    architecture: EncoderDecoderArchitecture, whole: dict[str, Tensor] | None, config: RunConfig, *, seed: int = 1
) -> Engine:
    """Join the groups and build this rank's part with the given weights; None: weights are loaded later."""
    initialize_parallel(config.parallel, seed=seed)
    chunks = build_model(
        architecture,
        parallel=config.parallel,
        precision=config.precision,
        recompute=config.recompute,
        kernels=config.kernels,
        dropout=config.dropout,
        encoder_length=ENCODER_LENGTH,
        decoder_length=DECODER_LENGTH,
    )
    if whole is not None:
        set_weights(chunks, whole)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            config=get_model_config(chunk), ddp_config=settings, module=chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
    optimizer = build_optimizer(config, wrapped)
    model_config = get_model_config(wrapped[0])
    model_config.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return Engine(config, wrapped, optimizer)


def assemble(results: Sequence[Sequence[Shard]], *, tolerance: float = 1e-5) -> dict[str, Tensor]:
    """Put the parts of all ranks together; copies of one part must agree."""
    whole: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for parts in results:
        for name, shape, offset, value in parts:
            tensor = whole.setdefault(name, torch.zeros(shape))
            mask = written.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            place = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
            if mask[place].any():
                difference = float((tensor[place] - value).abs().max())
                assert difference <= tolerance * float(value.abs().max() + 1e-3), f"copies of {name}: {difference:.2e}"
            tensor[place], mask[place] = value.float(), True
    assert all(bool(mask.all()) for mask in written.values())
    return whole
