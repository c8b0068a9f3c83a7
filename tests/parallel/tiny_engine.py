"""A tiny BLOOM, its gradient buffers and its optimizer inside one forked rank, with weights known by name."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model

from megatron_xmtf.checkpoint.saver import CheckpointSaver, SaveRequest
from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import pack_examples
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.models.forward import chunk_iterators, forward_chunk
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.training.loss import micro_batch_loss
from megatron_xmtf.training.optimizer import build_optimizer, set_learning_rate
from tests.tiny import VOCAB_SIZE, random_examples

ARCHITECTURE = BloomArchitecture(hidden_size=64, num_layers=4, num_attention_heads=4, vocab_size=VOCAB_SIZE)
SEQUENCE = 32
LEARNING_RATE = 1e-2
SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


@dataclass
class Engine:
    """What one rank trains with."""

    config: RunConfig
    chunks: list[Any]
    optimizer: MegatronOptimizer

    def train_step(self, batches: Sequence[Batch]) -> float | None:
        """Do one update and return the gradient norm."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_backward(self.chunks, batches)
        set_learning_rate(self.optimizer, LEARNING_RATE)
        _, norm, _ = self.optimizer.step()
        return None if norm is None else float(norm)


def save_checkpoint(engine: Any, path: Path, *, side_files: Path) -> None:
    """Save what an engine with `chunks`, `optimizer` and `config` trains, as a run does; all ranks call it.

    Args:    side_files: an empty directory.
    """
    saver = CheckpointSaver(engine.chunks, engine.optimizer)
    saver.start(SaveRequest(path, 2, engine.config, 0, side_files, {}))
    saver.finish()


def run_config(**parallel: Any) -> RunConfig:
    """Return a configuration whose files do not exist; only its numbers are used."""
    values = {
        "model": "none",
        "output": "none",
        "data": {"train": [{"prefix": "none"}]},
        "schedule": {"train_steps": 4},
        "precision": "fp32",
        "optimizer": {"lr": LEARNING_RATE},
        "parallel": parallel,
    }
    return config_from_mapping(values, RunConfig, source="test")


def build_engine(config: RunConfig, *, bucket_size: int | None = None) -> Engine:
    """Build this rank's part; the weights are the same at every layout.

    Args:    bucket_size: parameters in one bucket of gradients; None leaves it to Megatron-Core.
    """
    chunks = build_model(ARCHITECTURE, parallel=config.parallel, precision=config.precision)
    fill_weights(chunks)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        bucket_size=bucket_size,
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
        model_config.no_sync_func = wrapped[0].no_sync
    return Engine(config, wrapped, optimizer)


def named_weights(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return this rank's weights by their layout-free names."""
    return {
        tensor.key: tensor.data
        for chunk in chunks
        for tensor in unwrap_model(chunk).sharded_state_dict(metadata=dict(SHARDING)).values()
        if isinstance(getattr(tensor, "data", None), torch.Tensor)
    }


def fill_weights(chunks: Sequence[Any]) -> None:
    """Draw each weight from a generator seeded with its name; tensor-parallel shards would all get the same."""
    for key, tensor in named_weights(chunks).items():
        center = 1.0 if key.endswith("layernorm.weight") else 0.0
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        with torch.no_grad():
            tensor.copy_(center + 0.1 * torch.randn(tensor.shape, generator=generator))


def tiny_batches(count: int, *, skip: int = 0) -> list[Batch]:
    """Return micro-batches of one row, after leaving out the first `skip`."""
    rows = pack_examples(random_examples(6 * (count + skip)), sequence_length=SEQUENCE, pad_id=3)
    assert len(rows) >= count + skip
    return [build_batch([row], normalization="target_token") for row in rows[skip : skip + count]]


def forward_backward(chunks: Sequence[Any], batches: Sequence[Batch]) -> None:
    """Add the gradient of the batches' mean loss to every `main_grad`."""

    def step(iterator: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        losses, batch = forward_chunk(iterator, chunk)
        return losses, partial(micro_batch_loss, batch)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=chunk_iterators(batches, chunks) if len(chunks) > 1 else iter(batches),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=False,
    )
