"""Time of a step: each chunk (`chunk_time.py`), the pipeline's fill and drain, what is sent, the update.

    a stage s_i         its chunks, forward and backward, and handing over at its borders
    all micro-batches   m max(s) + (sum(s) - max(s)) / v        the second term is the bubble, (p - 1) / (v m) of the
                                                                first where stages are alike
    (an upper bound: where an earlier stage than the last is the slowest, its first forward passes fill the wait)
    a step              that + gradients and weights of data-parallel ranks + the tied embedding + the update

    BLOOM-176B, TP4 PP12 DP8 MBS2 on Jean Zay: 128 x 0.703 s + 7.61 s of bubble + 6.92 s = 104.5 s, as published

Source:  Narayanan et al. 2021, arXiv 2104.04473, sections 2.2 and 5.1. Checked against published runs in
         `tests/planning/test_published_runs.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.stages import layer_costs
from megatron_xmtf.planning.chunk_time import ChunkTime, add_times, chunk_time
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.communication import (
    Traffic,
    data_traffic,
    embedding_traffic,
    pipeline_traffic,
)
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.model_shape import rank_size, stage_chunks
from megatron_xmtf.training.encoder_decoder_flops import model_flops_per_row
from megatron_xmtf.training.flops import model_flops_per_token

__all__ = ["StepTime", "hardware_flops_per_row", "model_flops", "step_time", "tflops_per_gpu"]

UPDATE_TRAFFIC = 30
"""Bytes a parameter that AdamW reads and writes: gradient, fp32 weight and moments, half-precision weight."""
NORM_TRAFFIC = 12
"""Bytes a parameter of what surrounds it: the norm of the gradients, scaling, zeroing."""
BUS_GB_PER_SECOND = 25.0
"""Of a GPU's PCIe bus, for an optimizer that lives in the CPU's memory: 12 bytes a parameter and step."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step; the parts add up to `seconds`."""

    seconds: float
    matmul: float
    """Of the slowest stage, as the next three."""
    memory: float
    launch: float
    tensor: float
    pipeline: float
    bubble: float
    """While the pipeline fills and drains."""
    data: float
    embedding: float
    update: float
    imbalance: float
    """Seconds that an average stage waits for the slowest; within the first five."""
    chunks: list[list[ChunkTime]]
    """Of each stage's chunks."""
    sent: dict[str, Traffic]
    """A step's traffic of one rank by kind: tensor, pipeline, data, embedding."""

    @property
    def bubble_fraction(self) -> float:
        """The bubble as a part of the step."""
        return self.bubble / self.seconds


def step_time(architecture: Architecture, layout: Layout, cluster: Cluster) -> StepTime:
    """Predict a step of `layout.micro_batches` micro-batches."""
    stages = stage_chunks(architecture, layout.parallel, lengths=layout.lengths)
    times = {
        chunk: chunk_time(architecture, chunk, layout, cluster)
        for chunk in dict.fromkeys(chunk for chunks in stages for chunk in chunks)
    }
    hand_overs = _hand_overs(architecture, layout, cluster)
    chunks = [
        [replace(times[chunk], pipeline=border.seconds) for chunk in held]
        for held, border in zip(stages, hand_overs, strict=True)
    ]
    whole = [add_times(*((1, chunk) for chunk in held)) for held in chunks]
    seconds = [stage.seconds for stage in whole]
    slowest = whole[seconds.index(max(seconds))]
    m = layout.micro_batches
    bubble = (sum(seconds) - slowest.seconds) / layout.vpp
    is_whole = layout.pp == 1 and layout.vpp == 1
    parameters = max(
        rank_size(architecture, held, tp=layout.tp, is_whole=is_whole).parameters for held in dict.fromkeys(stages)
    )
    data, embedding = (
        data_traffic(layout, cluster, parameters=parameters),
        embedding_traffic(architecture, layout, cluster),
    )
    most = max(hand_overs, key=lambda traffic: traffic.seconds)
    exposed = _exposed(layout, data, slowest)
    update = _update_seconds(layout, cluster, parameters)
    total = m * slowest.seconds + bubble + exposed + embedding.seconds + update
    return StepTime(
        seconds=total,
        matmul=m * slowest.matmul,
        memory=m * slowest.memory,
        launch=m * slowest.launch,
        tensor=m * slowest.tensor,
        pipeline=m * slowest.pipeline,
        bubble=bubble,
        data=exposed,
        embedding=embedding.seconds,
        update=update,
        imbalance=m * (slowest.seconds - sum(seconds) / len(seconds)),
        chunks=chunks,
        sent={
            "tensor": Traffic(m * slowest.tensor_gigabytes, m * slowest.tensor),
            "pipeline": Traffic(m * layout.vpp * most.gigabytes, m * layout.vpp * most.seconds),
            "data": data,
            "embedding": embedding,
        },
    )


def _hand_overs(architecture: Architecture, layout: Layout, cluster: Cluster) -> list[Traffic]:
    """Return what each stage hands over and takes at its borders, a micro-batch and chunk."""
    if layout.pp == 1:
        return [Traffic(0.0, 0.0)]
    inner = [pipeline_traffic(architecture, layout, cluster, border=border) for border in range(layout.pp - 1)]
    # Chunks of a virtual pipeline go on from the last stage to the first.
    outer = pipeline_traffic(architecture, layout, cluster, border=None) if layout.vpp > 1 else Traffic(0.0, 0.0)
    turns = layout.engine.turns_per_border
    borders = [outer, *inner, outer]
    return [
        Traffic(before.gigabytes + after.gigabytes, turns * (before.seconds + after.seconds))
        for before, after in itertools.pairwise(borders)
    ]


def _exposed(layout: Layout, data: Traffic, slowest: ChunkTime) -> float:
    """Return the seconds of data-parallel traffic that nothing hides.

    With `overlap_grad_reduce` gradients leave during the last micro-batch's backward pass, with `overlap_param_gather`
    weights arrive during the first one's forward pass.
    """
    hidden = 0.0
    if layout.parallel.overlap_grad_reduce:
        hidden += slowest.seconds - slowest.pipeline - slowest.forward
    if layout.parallel.overlap_param_gather:
        hidden += slowest.forward
    return max(0.0, data.seconds - hidden)


def _update_seconds(layout: Layout, cluster: Cluster, parameters: int) -> float:
    share = layout.dp if layout.shards_optimizer else 1
    seconds = parameters * (UPDATE_TRAFFIC / share + NORM_TRAFFIC)
    seconds /= cluster.memory_gb_per_second * 1e9 * cluster.memory_fraction
    if layout.offloads_optimizer:
        seconds += 12 * parameters / share / (BUS_GB_PER_SECOND * 1e9)
    return seconds


def model_flops(architecture: Architecture, layout: Layout) -> float:
    """Return the model FLOPs of a step, as the field counts them: whole rows, full attention, no recomputation."""
    encoder, decoder = layout.sides
    if isinstance(architecture, BloomArchitecture):
        row = decoder * model_flops_per_token(architecture, sequence_length=decoder)
    else:
        row = model_flops_per_row(architecture, encoder_length=encoder, decoder_length=decoder)
    return layout.global_batch_size * row


def hardware_flops_per_row(architecture: Architecture, layout: Layout) -> float:
    """Return the FLOPs of a row with what is computed again: BigScience's and Megatron-LM's 2021 figures.

    A BLOOM, whole layers: 96 s l h^2 (1 + s / 6h + V / 16lh).
    """
    encoder, decoder = layout.sides
    row = model_flops(architecture, layout) / layout.global_batch_size
    if layout.recompute.granularity == "none":
        return row
    if isinstance(architecture, BloomArchitecture):
        hidden, layers = architecture.hidden_size, architecture.num_layers
        scores = 4.0 * layers * hidden * decoder**2
        return row + scores + (24.0 * layers * hidden**2 * decoder if layout.recompute.granularity == "full" else 0.0)
    if layout.recompute.granularity == "full":
        return row + sum(layer_costs(architecture, encoder, decoder))
    inner = architecture.attention_size
    scores = architecture.num_encoder_layers * encoder**2 + architecture.num_decoder_layers * decoder * (
        decoder + encoder
    )
    return row + 4.0 * inner * scores


def tflops_per_gpu(flops: float, *, seconds: float, gpus: int) -> float:
    """Return TFLOP/s a GPU."""
    return flops / seconds / gpus / 1e12
