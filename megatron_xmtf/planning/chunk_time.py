"""Seconds of one micro-batch in one chunk of the model on one rank, forward and backward: a roofline of each part.

    a layer's forward   matrix products in waves (`matrix_products.py`) / (peak x matmul_fraction)
                        + other traffic / (memory x memory_fraction)
                        + sums over tensor-parallel ranks + a third of launch_ms_per_layer
    its backward        products for its inputs and its weights; what is recomputed; adding up gradients; of its sums
                        what no product hides
    the embedding       its rows, their sum over the tensor-parallel ranks; the gradient of the whole table
    the output layer    products, traffic of the logits, adding up the gradient

Source:  the traffic is counted from Megatron's kernels (`layer_work.py`); of the loss, from its
         mpu/cross_entropy.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.communication import Traffic, tensor_traffic
from megatron_xmtf.planning.layer_work import LayerWork, layer_work, work_key
from megatron_xmtf.planning.layout import HeadKind, Layout
from megatron_xmtf.planning.matrix_products import attention_flops, linear_flops
from megatron_xmtf.planning.memory_model import LOGITS_AT_ONCE
from megatron_xmtf.planning.model_shape import ChunkShape

__all__ = ["ChunkTime", "add_times", "chunk_time"]

LOGIT_TRAFFIC: dict[tuple[HeadKind, int], tuple[float, float]] = {
    # Two kernels: read; read and written.
    ("fused", 2): (2, 4),
    ("fused", 4): (4, 8),
    # Plain torch: maximum (2), made fp32 (6), subtracted (8), exponential (8), sum (4); backward made fp32 (6),
    # subtracted (8), exponential (8), scaled (8), made half (6). In fp32 nothing is converted.
    ("chunked", 2): (28, 36),
    ("chunked", 4): (24, 24),
    # torch's cross-entropy: made fp32 (6), log of softmax (8); backward through it (12), made half (6).
    ("reference", 2): (14, 18),
    ("reference", 4): (8, 12),
}
"""Bytes of memory traffic a logit beside the products, (forward, backward), by the bytes of a number: our head."""
WHOLE_LOGIT_TRAFFIC = (38, 14)
"""Of Megatron's cross-entropy over whole logits: made fp32 (6), maximum (4), subtracted (8), exponential (8), sum (4),
divided (8); backward scaled (8) and made half (6)."""

ALIGNED_BYTES = 16
"""What rows of an operand begin at a multiple of, where tensor cores take it."""


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
    tensor_gigabytes: float = 0.0
    """That a rank sends to the others of its tensor-parallel group."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.matmul + self.memory + self.launch + self.tensor + self.pipeline


def add_times(*times: tuple[int, ChunkTime]) -> ChunkTime:
    """Add up times, part by part: (how often, time)."""
    sums = {part.name: sum(count * getattr(one, part.name) for count, one in times) for part in fields(ChunkTime)}
    return ChunkTime(**sums)


def chunk_time(architecture: Architecture, chunk: ChunkShape, layout: Layout, cluster: Cluster) -> ChunkTime:
    """Return the time of a chunk without what it hands over."""
    key = work_key(layout)
    parts = [
        (count, _layer_time(layer_work(architecture, kind, key), layout, cluster, is_causal=kind == "causal"))
        for kind, count in chunk.layers
    ]
    if chunk.embeds:
        is_tied = isinstance(architecture, BloomArchitecture) or architecture.tied_head
        # Our own heads add their gradient to the sum themselves.
        by_autograd = layout.engine.keeps_logits or layout.head == "reference"
        joins_head = chunk.answers and is_tied and by_autograd
        parts.append((1, _embedding_time(architecture, layout, cluster, joins_head=joins_head)))
    if chunk.answers:
        parts.append((1, _head_time(architecture, layout, cluster)))
    return add_times(*parts)


def _rates(layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Return (operations, bytes) a second that matrix products and the memory reach."""
    peak = cluster.fp32_tflops if layout.precision == "fp32" else cluster.peak_tflops
    return peak * 1e12 * cluster.matmul_fraction, cluster.memory_gb_per_second * 1e9 * cluster.memory_fraction


def _linear_flops(
    tokens: int, inputs: int, outputs: int, layout: Layout, cluster: Cluster
) -> tuple[float, float, float]:
    """Return `linear_flops` on a cluster's GPU."""
    peak = cluster.fp32_tflops if layout.precision == "fp32" else cluster.peak_tflops
    return linear_flops(
        tokens,
        inputs,
        outputs,
        multiprocessors=cluster.multiprocessors,
        shortest_piece=math.ceil(4e3 * peak / cluster.memory_gb_per_second),
    )


def _layer_time(work: LayerWork, layout: Layout, cluster: Cluster, *, is_causal: bool) -> ChunkTime:
    operations, memory = _rates(layout, cluster)
    scores_forward, scores_backward = _attention_seconds(work, layout, cluster, is_causal=is_causal)
    flops = [_linear_flops(*product, layout, cluster) for product in work.products]
    products = sum(forward for forward, _, _ in flops) / operations
    products_backward = sum(of_inputs + of_weights for _, of_inputs, of_weights in flops) / operations
    again_matmul = again_bytes = 0.0
    if layout.recompute.granularity == "full":
        again_matmul, again_bytes = products + scores_forward, work.forward_bytes
    elif layout.recompute.granularity == "selective":
        again_matmul, again_bytes = scores_forward, work.score_forward_bytes
    added = work.parameters * _accumulated_bytes(layout, can_fuse=True)
    passes = 2 if layout.recompute.granularity == "full" else 1
    sums_forward = tensor_traffic(layout, cluster, reduced_bytes=work.reduced_forward, sums=work.sums_forward)
    sums_backward = _backward_sums(work, layout, cluster)
    launch = cluster.launch_ms_per_layer / 1e3
    return ChunkTime(
        matmul=products + products_backward + scores_forward + scores_backward + again_matmul,
        memory=(work.forward_bytes + work.backward_bytes + again_bytes + added) / memory,
        launch=launch,
        tensor=passes * sums_forward.seconds + sums_backward.seconds,
        forward=products + scores_forward + work.forward_bytes / memory + sums_forward.seconds + launch / 3,
        tensor_gigabytes=passes * sums_forward.gigabytes + sums_backward.gigabytes,
    )


def _backward_sums(work: LayerWork, layout: Layout, cluster: Cluster) -> Traffic:
    """Return what tensor-parallel ranks send in a layer's backward pass, and the seconds that no product hides.

    Without sequence parallelism each gradient of what came in is summed beside the product of the weights' gradient.
    With it, half of a sum is a gather of the row-parallel layer's gradient, which nothing hides; the column-parallel
    layer gathers its input again beside one product, half a sum more, and scatters the gradient beside the other.
    """
    operations, _ = _rates(layout, cluster)
    sent = seconds = 0.0
    for (tokens, inputs, outputs), is_summed in zip(work.products, work.sums_inputs, strict=True):
        if not is_summed:
            continue
        whole = tensor_traffic(layout, cluster, reduced_bytes=float(tokens * inputs * layout.number_bytes), sums=1)
        sent += whole.gigabytes
        if not layout.engine.overlaps_sums:
            seconds += whole.seconds
            continue
        _, of_inputs, of_weights = _linear_flops(tokens, inputs, outputs, layout, cluster)
        if not layout.parallel.sequence_parallel:
            seconds += max(0.0, whole.seconds - of_weights / operations)
            continue
        half = whole.seconds / 2
        sent += whole.gigabytes / 2
        seconds += half + max(0.0, half - of_inputs / operations) + max(0.0, half - of_weights / operations)
    return Traffic(sent, seconds)


def _attention_seconds(work: LayerWork, layout: Layout, cluster: Cluster, *, is_causal: bool) -> tuple[float, float]:
    """Return the seconds of scores and values, (forward, backward); twice the operations backward.

    A fused kernel leaves out what lies behind the diagonal and computes the scores again backward (5 products for 2).
    Our reference computes scores in fp32: half of its operations. Without tensor cores, heads whose rows begin at no
    multiple of 16 bytes.
    """
    operations, _ = _rates(layout, cluster)
    whole = sum(4.0 * heads * query * key * head_dim for heads, query, key, head_dim in work.attentions)
    if layout.attention == "fused":
        flops = whole * (0.5 if is_causal else 1.0)
        forward = flops / (cluster.peak_tflops * 1e12 * cluster.attention_fraction)
        return forward, 2.5 * forward
    counted = [attention_flops(*attention, multiprocessors=cluster.multiprocessors) for attention in work.attentions]
    scores, values, backward = (sum(part) / operations for part in zip(*counted, strict=True))
    if layout.precision == "fp32":
        return scores + values, backward
    if any(head_dim * layout.number_bytes % ALIGNED_BYTES for *_, head_dim in work.attentions):
        slow = whole / (cluster.fp32_tflops * 1e12 * cluster.unaligned_fraction)
        scores, values, backward = slow / 2, slow / 2, 2 * slow
    if layout.attention in ("reference", "sdpa"):
        scores = whole / 2 / (cluster.fp32_tflops * 1e12 * cluster.matmul_fraction)
        backward = 2 * (scores + values)
    return scores + values, backward


def _embedding_time(architecture: Architecture, layout: Layout, cluster: Cluster, *, joins_head: bool) -> ChunkTime:
    """Return the time of looking words up, of the norm behind (BLOOM) and of the table's gradient, which is dense.

    Args:    joins_head: table and head are one parameter of this rank: autograd sums both gradients before they are
             added up, once, in the head's time.
    """
    _, memory = _rates(layout, cluster)
    numbers = layout.micro_batch_size * sum(layout.sides) * architecture.hidden_size
    norm = isinstance(architecture, BloomArchitecture)
    mask = 5 if layout.dropout else 0
    wide = layout.number_bytes / 2
    forward = numbers * (6 + 4 * norm + mask) * wide / memory
    backward = numbers * (10 + 10 * norm + mask) * wide / memory
    table = architecture.padded_vocab_size / layout.tp * architecture.hidden_size
    added = 3 * layout.number_bytes if joins_head else _accumulated_bytes(layout, can_fuse=False)
    backward += table * (layout.number_bytes + added) / memory
    found = tensor_traffic(layout, cluster, reduced_bytes=numbers * layout.number_bytes, sums=1)
    return ChunkTime(
        memory=forward + backward,
        tensor=found.seconds,
        forward=forward + found.seconds,
        tensor_gigabytes=found.gigabytes,
    )


def _head_time(architecture: Architecture, layout: Layout, cluster: Cluster) -> ChunkTime:
    """Return the time of the output layer and its loss, of all positions only where the engine keeps all logits."""
    operations, memory = _rates(layout, cluster)
    positions = float(layout.micro_batch_size * layout.sides[1])
    words = architecture.padded_vocab_size / layout.tp
    again, pieces, wide = 0, 1, layout.number_bytes / 2
    logit_forward, logit_backward = (part * wide for part in WHOLE_LOGIT_TRAFFIC)
    if not layout.engine.keeps_logits:
        positions *= layout.loss_fraction
        logit_forward, logit_backward = LOGIT_TRAFFIC[layout.head, layout.number_bytes]
        # Beyond one chunk the logits are computed again in the backward pass.
        pieces = 1 if layout.head == "reference" else max(1, math.ceil(positions * words / LOGITS_AT_ONCE))
        again = 0 if pieces == 1 else 1
    forward, of_input, of_weight = _linear_flops(
        math.ceil(positions), architecture.hidden_size, math.ceil(words), layout, cluster
    )
    traffic = (logit_forward + logit_backward) * positions * words / memory
    # Our head's gradient is a parameter's like any other, which nothing adds up within the product.
    can_fuse = layout.engine.keeps_logits
    added = words * architecture.hidden_size * _accumulated_bytes(layout, can_fuse=can_fuse)
    if again and layout.number_bytes == 2:
        # The input's gradient, read, and added to an fp32 sum.
        added += pieces * positions * architecture.hidden_size * 10
    # Each rank has the gradient from its own words.
    summed = tensor_traffic(
        layout, cluster, reduced_bytes=positions * architecture.hidden_size * layout.number_bytes, sums=1
    )
    return ChunkTime(
        matmul=((1 + again) * forward + of_input + of_weight) / operations,
        memory=traffic + added / memory,
        tensor=summed.seconds,
        forward=forward / operations + logit_forward * positions * words / memory,
        tensor_gigabytes=summed.gigabytes,
    )


def _accumulated_bytes(layout: Layout, *, can_fuse: bool) -> float:
    """Return the memory traffic of a parameter whose gradient is added up.

    Args:    can_fuse: its gradient may be added up within the product that makes it.
    """
    if layout.precision == "fp32":
        return 12
    return 8 if layout.fuses_weight_gradient and can_fuse else layout.engine.accumulate_bytes
