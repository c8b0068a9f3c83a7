"""Time of a step: a roofline of each layer, the pipeline's fill and drain, what is sent, the update.

    a layer's forward   matrix products / (peak x matmul_fraction) + other traffic / (memory x memory_fraction)
                        + sums over tensor-parallel ranks + a third of launch_ms_per_layer
    its backward        twice the products; the recomputed forward; adding up gradients
    a stage s_i         its chunks, forward and backward, and handing over to its neighbours
    all micro-batches   m max(s) + (sum(s) - max(s)) / v        the second term is the bubble, (p - 1) / (v m) of the
                                                                first where stages are alike
    (an upper bound: where an earlier stage than the last is the slowest, its first forward passes fill the wait)
    a step              that + gradients and weights of data-parallel ranks + the tied embedding + the update

    BLOOM-176B, TP4 PP12 DP8 MBS2 on Jean Zay: 128 x 0.708 s + 7.65 s of bubble + 6.19 s = 104.5 s, as published

Source:  Narayanan et al. 2021, arXiv 2104.04473, sections 2.2 and 5.1. Checked against published runs in
         `tests/planning/test_published_runs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.stages import layer_costs
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.communication import (
    Traffic,
    data_traffic,
    embedding_traffic,
    pipeline_traffic,
    reduced_bytes,
    tensor_traffic,
)
from megatron_xmtf.planning.layer_work import LayerWork, layer_work, work_key
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.memory_model import LOGITS_AT_ONCE
from megatron_xmtf.planning.model_shape import ChunkShape, chunk_parameters, count_parameters, stage_chunks
from megatron_xmtf.training.encoder_decoder_flops import model_flops_per_row
from megatron_xmtf.training.flops import model_flops_per_token

__all__ = ["ChunkTime", "StepTime", "hardware_flops_per_row", "model_flops", "step_time", "tflops_per_gpu"]

LOGIT_TRAFFIC = 24
"""Bytes of memory traffic a logit, forward and backward, in half precision."""
UPDATE_TRAFFIC = 30
"""Bytes a parameter that AdamW reads and writes: gradient, fp32 weight and moments, half-precision weight."""
NORM_TRAFFIC = 12
"""Bytes a parameter of what surrounds it: the norm of the gradients, scaling, zeroing."""
BUS_GB_PER_SECOND = 25.0
"""Of a GPU's PCIe bus, for an optimizer that lives in the CPU's memory: 12 bytes a parameter and step."""


@dataclass(frozen=True)
class ChunkTime:
    """Seconds of one chunk and micro-batch, forward and backward together unless a name says otherwise."""

    matmul: float = 0.0
    memory: float = 0.0
    """Everything that is bound by the GPU's memory."""
    launch: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0
    forward: float = 0.0
    """Of the whole, without handing over."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.matmul + self.memory + self.launch + self.tensor + self.pipeline

    def __add__(self, other: ChunkTime) -> ChunkTime:
        """Add, part by part."""
        names = ("matmul", "memory", "launch", "tensor", "pipeline", "forward")
        return ChunkTime(**{name: getattr(self, name) + getattr(other, name) for name in names})


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
    hand_over = pipeline_traffic(architecture, layout, cluster)
    times: dict[ChunkShape, ChunkTime] = {}
    for chunk in {chunk for chunks in stages for chunk in chunks}:
        times[chunk] = replace(
            _chunk_time(architecture, chunk, layout, cluster), pipeline=2 * hand_over.seconds if layout.pp > 1 else 0.0
        )
    chunks = [[times[chunk] for chunk in held] for held in stages]
    whole = [sum(held, ChunkTime()) for held in chunks]
    seconds = [stage.seconds for stage in whole]
    slowest = whole[seconds.index(max(seconds))]
    m = layout.micro_batches
    bubble = (sum(seconds) - slowest.seconds) / layout.vpp
    is_whole = layout.pp == 1 and layout.vpp == 1
    parameters = max(
        count_parameters(
            [
                entry
                for chunk in held
                for entry in chunk_parameters(architecture, chunk, tp=layout.tp, is_whole=is_whole)
            ]
        )
        for held in {tuple(held) for held in stages}
    )
    data, embedding = (
        data_traffic(layout, cluster, parameters=parameters),
        embedding_traffic(architecture, layout, cluster),
    )
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
            "tensor": Traffic(m * slowest.tensor * _tensor_rate(layout, cluster), m * slowest.tensor),
            "pipeline": Traffic(2 * m * layout.vpp * hand_over.gigabytes, 2 * m * layout.vpp * hand_over.seconds),
            "data": data,
            "embedding": embedding,
        },
    )


def _tensor_rate(layout: Layout, cluster: Cluster) -> float:
    """Return GB/s of sums over the tensor-parallel ranks."""
    sent = tensor_traffic(layout, cluster, reduced_bytes=1e9)
    return sent.gigabytes / sent.seconds if sent.seconds else 0.0


def _chunk_time(architecture: Architecture, chunk: ChunkShape, layout: Layout, cluster: Cluster) -> ChunkTime:
    total = ChunkTime()
    key = work_key(layout)
    for kind, count in chunk.layers:
        layer = _layer_time(layer_work(architecture, kind, key), layout, cluster, is_causal=kind == "causal")
        total += ChunkTime(
            **{name: count * getattr(layer, name) for name in ("matmul", "memory", "launch", "tensor", "forward")}
        )
    return total + _head_time(architecture, layout, cluster) if chunk.answers else total


def _rates(layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Return (operations, bytes) a second that matrix products and the memory reach."""
    peak = cluster.fp32_tflops if layout.precision == "fp32" else cluster.peak_tflops
    return peak * 1e12 * cluster.matmul_fraction, cluster.memory_gb_per_second * 1e9 * cluster.memory_fraction


def _layer_time(work: LayerWork, layout: Layout, cluster: Cluster, *, is_causal: bool) -> ChunkTime:
    operations, memory = _rates(layout, cluster)
    scores_forward, scores_backward = _score_seconds(work, layout, cluster, is_causal=is_causal)
    products = work.matmul_flops / operations
    again_matmul = again_bytes = 0.0
    if layout.recompute.granularity == "full":
        again_matmul, again_bytes = products + scores_forward, work.forward_bytes
    elif layout.recompute.granularity == "selective":
        again_matmul, again_bytes = scores_forward, work.score_forward_bytes
    added = work.parameters * (8 if layout.fuses_weight_gradient else layout.engine.accumulate_bytes)
    if layout.precision == "fp32":
        added = work.parameters * 12
    reduced_forward, reduced_backward = reduced_bytes(work, layout)
    tensor_forward = tensor_traffic(layout, cluster, reduced_bytes=reduced_forward).seconds
    tensor_backward = tensor_traffic(layout, cluster, reduced_bytes=reduced_backward).seconds
    launch = cluster.launch_ms_per_layer / 1e3
    return ChunkTime(
        matmul=3 * products + scores_forward + scores_backward + again_matmul,
        memory=(work.forward_bytes + work.backward_bytes + again_bytes + added) / memory,
        launch=launch,
        tensor=tensor_forward + tensor_backward,
        forward=products + scores_forward + work.forward_bytes / memory + tensor_forward + launch / 3,
    )


def _score_seconds(work: LayerWork, layout: Layout, cluster: Cluster, *, is_causal: bool) -> tuple[float, float]:
    """Return the seconds of scores and values, (forward, backward); twice the operations backward.

    A fused kernel leaves out what lies behind the diagonal and computes the scores again backward (5 products for 2).
    Our reference computes scores in fp32: half of its operations.
    """
    operations, _ = _rates(layout, cluster)
    if layout.attention == "fused":
        flops = work.score_flops * (0.5 if is_causal else 1.0)
        forward = flops / (cluster.peak_tflops * 1e12 * cluster.attention_fraction)
        return forward, 2.5 * forward
    if layout.attention in ("reference", "sdpa") and layout.precision != "fp32":
        fp32 = cluster.fp32_tflops * 1e12 * cluster.matmul_fraction
        forward = work.score_flops / 2 / operations + work.score_flops / 2 / fp32
        return forward, 2 * forward
    return work.score_flops / operations, 2 * work.score_flops / operations


def _head_time(architecture: Architecture, layout: Layout, cluster: Cluster) -> ChunkTime:
    """Return the time of the output layer and its loss, of all positions only where the engine keeps all logits."""
    operations, memory = _rates(layout, cluster)
    positions = float(layout.micro_batch_size * layout.sides[1])
    words = architecture.padded_vocab_size / layout.tp
    products = 3
    if not layout.engine.keeps_logits:
        positions = positions * layout.loss_fraction
        # Beyond one chunk the logits are computed again in the backward pass.
        products = 3 if positions * words <= LOGITS_AT_ONCE else 4
    product = 2.0 * positions * architecture.hidden_size * words / operations
    traffic = LOGIT_TRAFFIC * layout.number_bytes / 2 * positions * words / memory
    return ChunkTime(matmul=products * product, memory=traffic, forward=product + traffic / 2)


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
