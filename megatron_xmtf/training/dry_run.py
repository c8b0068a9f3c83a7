"""Check a run of any size on one CPU: inputs as `prepare_run` does, and the model of every rank on meta tensors.

    stage    layers  holds             parameters  weights  gradients  optimizer
    0             0  embedding      3,596,644,352      6.7       13.4       10.0    GiB a rank
    1 - 70        1                 2,466,437,120      4.6        9.2        6.9
    71            0  head           3,596,644,352      6.7       13.4       10.0    BLOOM-176B, 72 stages, 4 copies

A process of its own pretends to be one rank of each distinct stage, in torch's fake process group: Megatron-Core
builds what it builds in training, at the real layout, without memory for a single weight.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.stages import stage_layers
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import check_world_size
from megatron_xmtf.training.prepare import prepare_run

__all__ = ["DryRun", "StageSize", "dry_run", "size_stages"]

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT_BYTES = 4
"""Gradients accumulate in fp32 whatever the precision."""


@dataclass(frozen=True)
class StageSize:
    """What each rank of some pipeline stages holds; bytes without activations and without padding of buffers."""

    stages: list[int]
    """First and last pipeline stage of this size."""
    layers: int
    embedding: bool
    head: bool
    parameters: int
    """Numbers in one rank's weights; the head's copy of the embedding counts, as it takes memory."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def count(self) -> int:
        """How many stages have this size."""
        return self.stages[1] - self.stages[0] + 1

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class DryRun:
    """A run that was checked and sized."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    data_parallel_size: int
    stages: list[StageSize]
    parameters: int
    """Numbers in the whole model, each once, without padding of the vocabulary."""
    train_steps: int
    tokens_per_step: float
    """On average: steps of a batch-size ramp are smaller."""
    training_tokens: int

    def to_mapping(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)

    def table(self) -> str:
        """Return the sizes of a rank, stage by stage, as text."""
        tp, pp, dp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.data_parallel_size
        lines = [
            f"{self.parameters:,} parameters over {tp * pp * dp} ranks: TP{tp} x PP{pp} x DP{dp}",
            f"{self.train_steps:,} steps x {self.tokens_per_step:,.0f} tokens = {self.training_tokens:,} tokens",
            "",
            f"{'stage':<10}{'layers':>7}  {'holds':<16}{'parameters':>16}{'weights':>10}{'gradients':>11}"
            f"{'optimizer':>11}{'together':>10}   GiB a rank, activations not counted",
        ]
        for stage in self.stages:
            name = str(stage.stages[0]) if stage.count == 1 else f"{stage.stages[0]} - {stage.stages[1]}"
            holds = ", ".join(what for what, there in (("embedding", stage.embedding), ("head", stage.head)) if there)
            sizes = (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.total_bytes)
            weights, gradients, optimizer, total = (f"{size / 2**30:.2f}" for size in sizes)
            lines.append(
                f"{name:<10}{stage.layers:>7}  {holds:<16}{stage.parameters:>16,}{weights:>10}{gradients:>11}"
                f"{optimizer:>11}{total:>10}"
            )
        return "\n".join(lines)


def dry_run(config: RunConfig, *, world_size: int, allowed_changes: Sequence[str] = ()) -> DryRun:
    """Check a run's inputs, build its packing index, and size what each rank will hold. Nothing is trained or imported.

    Args:    world_size: ranks that the run will have; none of them need be here. allowed_changes: keys that may differ
             from the resumed checkpoint's.
    Raises:  what `prepare_run` raises. CheckpointError: the ranks' parameters do not add up to the model.
    """
    prepared = prepare_run(config, world_size=world_size, allowed_changes=allowed_changes, import_model=False)
    stages, parameters = size_stages(prepared.architecture, config, world_size=world_size)
    training_tokens = config.train_rows * config.batch.sequence_length
    return DryRun(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        data_parallel_size=check_world_size(config.parallel, world_size),
        stages=stages,
        parameters=parameters,
        train_steps=config.train_steps,
        tokens_per_step=training_tokens / config.train_steps,
        training_tokens=training_tokens,
    )


def size_stages(architecture: Architecture, config: RunConfig, *, world_size: int) -> tuple[list[StageSize], int]:
    """Build one rank of each distinct pipeline stage on meta tensors, and count.

    Returns: sizes of neighbouring stages that are alike, and the parameters of the whole model, counted from them.
    Raises:  CheckpointError: they are not those of the closed formula (`BloomArchitecture.parameter_count`).
    """
    alike = _distinct_stages(architecture, config)
    (shapes,) = run_ranks(
        _parameters_of_stages, world_size=1, arguments=(architecture, config, world_size, [first for first, _ in alike])
    )
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    copies = check_world_size(config.parallel, world_size)
    layers = _layers_of_stages(architecture, config)
    stages, found = [], 0
    for (first, last), parameters in zip(alike, shapes, strict=True):
        stages.append(
            StageSize(
                stages=[first, last],
                layers=sum(map(sum, layers[first])),
                embedding=first == 0,
                head=last == pp - 1,
                parameters=sum(count for count, _, _ in parameters),
                weight_bytes=sum(count for count, _, _ in parameters) * WEIGHT_BYTES[config.precision],
                gradient_bytes=sum(count for count, _, _ in parameters) * GRADIENT_BYTES,
                optimizer_bytes=_optimizer_bytes(config, parameters, copies),
            )
        )
        found += (last - first + 1) * sum(count * (tp if split else 1) for count, split, _ in parameters)
    found -= _copied_and_padded(architecture, config)
    if found != architecture.parameter_count:
        raise CheckpointError(
            f"the ranks' parameters add up to {found:,}, the model has {architecture.parameter_count:,}: the pipeline "
            "does not hold each layer exactly once; this is a defect, please report the configuration."
        )
    return stages, found


def _distinct_stages(architecture: Architecture, config: RunConfig) -> list[tuple[int, int]]:
    """Return ranges (first, last) of neighbouring pipeline stages that hold the same.

    [[0], [1], [1], [1], [0]]  ->  (0, 0) embedding, (1, 3), (4, 4) head
    """
    layers = _layers_of_stages(architecture, config)
    final = len(layers) - 1
    ranges: list[tuple[int, int]] = []
    for stage, chunks in enumerate(layers):
        inner = stage not in (0, 1, final)
        if inner and layers[stage - 1] == chunks:
            ranges[-1] = (ranges[-1][0], stage)
        else:
            ranges.append((stage, stage))
    return ranges


def _layers_of_stages(architecture: Architecture, config: RunConfig) -> list[list[tuple[int, ...]]]:
    """Return what the chunks of each stage hold: the number of layers of each kind.

    a BLOOM of 4 layers, 2 stages       [[(2,)], [(2,)]]
    an mT5 of 4 + 3 layers, 2 stages    [[(3, 0, 0)], [(0, 1, 3)]]     encoder, its last with the norm, decoder
    """
    if isinstance(architecture, BloomArchitecture):
        return [[(count,) for count in chunks] for chunks in architecture.chunk_layers(config.parallel)]
    last = architecture.num_encoder_layers - 1
    lengths = {"encoder_length": config.batch.encoder_length, "decoder_length": config.batch.decoder_length}
    return [
        [
            (sum(number < last for number in chunk), int(last in chunk), sum(number > last for number in chunk))
            for chunk in chunks
        ]
        for chunks in stage_layers(architecture, config.parallel, **lengths)
    ]


def _copied_and_padded(architecture: Architecture, config: RunConfig) -> int:
    """Return the numbers that ranks hold beyond the model's own: copies over stages, and padding of vocabularies."""
    stages = config.parallel.pipeline_model_parallel_size
    padded = architecture.padded_vocab_size * architecture.hidden_size
    padding = padded - architecture.vocab_size * architecture.hidden_size
    if isinstance(architecture, BloomArchitecture):
        # The last of several stages holds a copy of the embedding for its head.
        return padded * (stages > 1) + padding
    tables = (1 if architecture.tied_embeddings else 2) + (0 if architecture.tied_head else 1)
    copies = padded if architecture.tied_head and stages > 1 else 0
    if architecture.positions == "relative":
        # Every chunk holds the tables of relative positions of both sides.
        chunks = stages * (config.parallel.virtual_pipeline_model_parallel_size or 1)
        copies += (chunks - 1) * 2 * architecture.relative_attention_num_buckets * architecture.num_attention_heads
    return copies + tables * padding


Parameter = tuple[int, bool, tuple[int, ...]]
"""Numbers held by this rank, whether each tensor-parallel rank holds another part, and the shape."""


def _parameters_of_stages(
    architecture: Architecture, config: RunConfig, world_size: int, stages: Sequence[int]
) -> list[list[Parameter]]:
    """Be one rank of each of some stages, in a process of its own whose GPUs are hidden, and list its parameters."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.getLogger().setLevel(logging.WARNING)  # each stage would say its kernels again
    import torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_xmtf.parallel.cpu_device import enter_cpu_device
    from megatron_xmtf.parallel.topology import destroy_parallel

    enter_cpu_device()
    found = []
    for stage in stages:
        # Megatron-Core numbers ranks by tensor, then data, then pipeline: this is the first rank of the stage.
        rank = stage * (world_size // config.parallel.pipeline_model_parallel_size)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            found.append(_meta_parameters(architecture, config))
        finally:
            destroy_parallel()
    return found


def _meta_parameters(architecture: Architecture, config: RunConfig) -> list[Parameter]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_xmtf.models.registry import build_model

    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
    with torch.device("meta"):
        chunks = build_model(
            architecture,
            parallel=parallel,
            precision=config.precision,
            recompute=config.recompute,
            kernels=config.kernels,
            encoder_length=config.batch.encoder_length,
            decoder_length=config.batch.decoder_length,
        )
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    assert all(parameter.is_meta for parameter in parameters), "a weight took memory"
    return [
        (parameter.numel(), bool(getattr(parameter, "tensor_model_parallel", False)), tuple(parameter.shape))
        for parameter in parameters
    ]


def _optimizer_bytes(config: RunConfig, parameters: Sequence[Parameter], copies: int) -> int:
    """Return one rank's bytes of optimizer state: fp32 moments, and fp32 weights beside those of half precision."""
    numbers = sum(count for count, _, _ in parameters)
    main_weights = 0 if config.precision == "fp32" else numbers
    if config.optimizer.name == "adafactor":
        # One number a row and one a column of a matrix, one a number of a vector.
        return 4 * (main_weights + sum(sum(shape) for _, _, shape in parameters))
    held = main_weights + 2 * numbers
    return 4 * -(-held // copies) if config.parallel.use_distributed_optimizer else 4 * held
