"""Memory of each rank by kind, stage by stage, at the worst moment of a step.

    weights      parameters x 2 bytes (fp32: 4)
    gradients    parameters x 4, of the engine's kind (`engine.py`)
    optimizer    parameters x 12, divided by dp where ranks share it; fp32: 8; Adafactor: rows and columns
    activations  of each micro-batch in flight, what the layers keep (`layer_work.py`), and of one layer that is
                 recomputed at the moment; in 1F1B stage i of p holds min(m, p - i) micro-batches, interleaved with v
                 chunks min(2 (p - i - 1) + (v - 1) p + 1, m v) chunks
    logits       published engines: 10 bytes each (half precision, fp32, gradient). Ours: 2 bytes each, of positions
                 with a loss, at most 2^28; gradients of the head's weight and input (`head_bytes`)
    framework    `framework_gib` of the cluster

    recompute    what a layer keeps          and again, for one layer
    none         all                         nothing
    selective    all but the scores          the scores
    full         its input                   everything

A parameter's gradient is made in half precision before it is added up. The largest are the table's of the first stage,
alive when nothing of a layer is, and the head's, counted with the logits (where both are one parameter, autograd keeps
the head's until the embedding has its own). Logits and a layer that is computed again are not held at the same moment:
their sum is a bound.

An encoder-decoder's stages pass one tensor [enc; dec] on: each micro-batch in flight keeps what came in and what goes
out of a chunk.

Source:  Korthikanti et al. 2022, arXiv 2205.05198, sections 4 and 5; Narayanan et al. 2021, section 2.2 (in flight).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.layer_work import layer_work, work_key
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.model_shape import ChunkShape, RankSize, rank_size, stage_chunks

__all__ = ["KINDS", "StageMemory", "chunks_in_flight", "head_bytes", "memory_by_stage"]

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "framework")
LOGITS_AT_ONCE = 1 << 28
"""As `kernels/head_loss/chunked.py` has it on a GPU."""
WIDE_AT_ONCE = 1 << 24
"""Logits that are held in fp32 beside them by plain torch, as there."""
GRADIENT_AT_ONCE = 1 << 26
"""Numbers of the gradient of a weight that the embedding has too, as there."""
PLAIN_LOGIT_BYTES = 10
GIB = 2.0**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of one pipeline stage, by kind."""

    stage: int
    layers: int
    parameters: int
    in_flight: int
    """Chunks of micro-batches whose activations are held at once."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    framework: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, kind) for kind in KINDS)

    def to_mapping(self) -> dict[str, float]:
        """Return the figures, with the sum."""
        return {**asdict(self), "total": self.total}


def chunks_in_flight(layout: Layout, stage: int) -> int:
    """Return how many (micro-batch, chunk) pairs a stage holds at most.

    1F1B, 4 stages, many micro-batches: 4, 3, 2, 1. Two chunks a stage: 11, 9, 7, 5.
    """
    p, v, m = layout.pp, layout.vpp, layout.micro_batches
    if v == 1:
        return min(m, p - stage)
    return min(2 * (p - stage - 1) + (v - 1) * p + 1, m * v)


def memory_by_stage(architecture: Architecture, layout: Layout, cluster: Cluster) -> list[StageMemory]:
    """Return what a rank of each stage holds."""
    stages = stage_chunks(architecture, layout.parallel, lengths=layout.lengths)
    is_whole = layout.pp == 1 and layout.vpp == 1
    sizes = {
        chunks: rank_size(architecture, chunks, tp=layout.tp, is_whole=is_whole) for chunks in dict.fromkeys(stages)
    }
    held = {chunks: _held_bytes(architecture, layout, chunks, sizes[chunks]) for chunks in sizes}
    found = []
    for stage, chunks in enumerate(stages):
        size, in_flight, (kept, live) = sizes[chunks], chunks_in_flight(layout, stage), held[chunks]
        found.append(
            StageMemory(
                stage=stage,
                layers=sum(chunk.num_layers for chunk in chunks),
                parameters=size.parameters,
                in_flight=in_flight,
                weights=size.parameters * layout.number_bytes,
                gradients=size.parameters * (4 if layout.precision == "fp32" else layout.engine.gradient_bytes),
                optimizer=_optimizer_bytes(layout, size.parameters, size.factored_numbers),
                activations=in_flight * kept + live,
                logits=head_bytes(architecture, layout, chunk=chunks[-1]) if chunks[-1].answers else 0.0,
                framework=cluster.framework_gib * GIB,
            )
        )
    return found


def _optimizer_bytes(layout: Layout, parameters: int, state_numbers: int) -> float:
    """Return the optimizer's bytes of one rank; with Adam, as the dry run has them."""
    main_weights = 0 if layout.precision == "fp32" else 4
    if layout.optimizer == "adafactor":
        return main_weights * parameters + 4.0 * state_numbers
    per_parameter = layout.engine.optimizer_bytes - (0 if main_weights else 4)
    if layout.offloads_optimizer:
        per_parameter -= 8
    share = layout.dp if layout.shards_optimizer else 1
    return parameters * (per_parameter / share + layout.engine.step_bytes)


def _held_bytes(
    architecture: Architecture, layout: Layout, chunks: tuple[ChunkShape, ...], size: RankSize
) -> tuple[float, float]:
    """Return the bytes that a chunk keeps of one micro-batch, and those that are alive for a moment beside."""
    # Chunks take turns; what one of them has more, as the first has the embedding, counts as often as it is in flight.
    kept = sum(_kept_by_chunk(architecture, layout, chunk) for chunk in chunks) / len(chunks)
    live = max((_live_bytes(architecture, layout, chunk) for chunk in chunks), default=0.0)
    if layout.engine.converts_gradients:
        # After the backward pass of a micro-batch, when nothing of a layer is alive.
        live = max(live, 4.0 * size.largest)
    elif not layout.engine.keeps_logits and any(chunk.embeds for chunk in chunks):
        table = architecture.padded_vocab_size / layout.tp * architecture.hidden_size
        live = max(live, table * layout.number_bytes)
    return kept, live


def _groups(layout: Layout, layers: int) -> tuple[float, float]:
    """Return (layers whose input is kept, layers kept whole) of a chunk under full recomputation."""
    number = layout.recompute.num_layers
    if layout.recompute.method == "uniform":
        return -(-layers // number), 0
    return min(number, layers), max(0, layers - number)


def _kept_by_chunk(architecture: Architecture, layout: Layout, chunk: ChunkShape) -> float:
    """Return what a chunk keeps of one micro-batch from its forward to its backward pass."""
    key, granularity = work_key(layout), layout.recompute.granularity
    kept = bias = 0.0
    for kind, count in chunk.layers:
        work = layer_work(architecture, kind, key)
        if granularity == "full":
            inputs, whole = _groups(layout, count)
            kept += inputs * work.input_bytes + whole * work.kept_bytes
        else:
            dropped = work.kept_score_bytes if granularity == "selective" else 0.0
            kept += count * (work.kept_bytes - dropped)
        # A dense bias lives as long as what is recomputed with it, and without recomputation for one forward pass.
        bias += work.bias_bytes if granularity != "none" else 0.0
    return kept + bias + _border_bytes(architecture, layout, chunk)


def _border_bytes(architecture: Architecture, layout: Layout, chunk: ChunkShape) -> float:
    """Return what a chunk keeps at its borders: the embedding's dropout, what came in, the last norm, the context."""
    rows, hidden, number = layout.micro_batch_size, architecture.hidden_size, layout.number_bytes
    encoder, decoder = layout.sides
    split = layout.tp if layout.parallel.sequence_parallel else 1
    tokens = rows * (encoder + decoder) * hidden / split
    held = 0.0
    if chunk.embeds:
        # Words behind the embedding's norm (BLOOM), and the mask.
        held += tokens * (number if isinstance(architecture, BloomArchitecture) else 0)
        held += tokens if layout.dropout else 0
    if chunk.answers:
        held += 2 * rows * decoder * hidden / split * number
    if not isinstance(architecture, BloomArchitecture):
        # [enc; dec] as it came in, and the copy that is sent on is freed; the context of cross-attention.
        held += 0 if chunk.embeds else tokens * number
        if any(kind == "decoder" for kind, _ in chunk.layers):
            held += rows * encoder * hidden / split * number
    return held


def _live_bytes(architecture: Architecture, layout: Layout, chunk: ChunkShape) -> float:
    """Return what is held beside for the one group of layers that is computed (again) at the moment."""
    key, granularity = work_key(layout), layout.recompute.granularity
    largest = 0.0
    for kind, count in chunk.layers:
        work = layer_work(architecture, kind, key)
        if granularity == "full":
            group = min(layout.recompute.num_layers, count) if layout.recompute.method == "uniform" else 1
            live = group * work.kept_bytes
        elif granularity == "selective":
            live = work.kept_score_bytes
        else:
            live = work.bias_bytes
        largest = max(largest, live)
    return largest


def head_bytes(
    architecture: Architecture, layout: Layout, *, chunk: ChunkShape | None = None, plain: bool | None = None
) -> float:
    """Return what the head holds at its worst moment, for one micro-batch on one rank, beside its weight and input.

    BLOOM's 250,880 words at TP4, two rows of 2,048, a loss at every position     plain         ours
    logits                    4,096 x 62,720                                      2.39 GiB      0.48 GiB
    gradient of the weight    62,720 x 14,336 x 2 bytes                           1.67 GiB      1.67 GiB
    gradient of the input     4,096 x 14,336 x 2 bytes                            0.11 GiB      0.11 GiB

    Beyond `LOGITS_AT_ONCE` logits the input's gradient is added up in fp32 beside each chunk's. Plain torch has a piece
    of the logits in fp32, in half precision two (forward a copy, and what is left when the largest is taken off;
    backward the next copy beside the last). Published engines hold gradients from step to step, and not here.

    Args:    chunk: where the head is: beside the embedding whose weight it has, it makes a part of the gradient at a
             time. plain: all logits at once; None: as the layout's engine does.
    """
    positions = layout.micro_batch_size * layout.sides[1]
    words, number = architecture.padded_vocab_size / layout.tp, layout.number_bytes
    of_weight = words * architecture.hidden_size * number
    if layout.engine.keeps_logits if plain is None else plain:
        logits = positions * words * (PLAIN_LOGIT_BYTES if layout.precision != "fp32" else 12)
        gradients = of_weight + positions * architecture.hidden_size * number
        return logits + (0 if layout.engine.keeps_logits else gradients)
    logits = positions * layout.loss_fraction * words
    hidden = positions * layout.loss_fraction * architecture.hidden_size
    if layout.head == "reference":
        return logits * (PLAIN_LOGIT_BYTES if number == 2 else 12) + of_weight + hidden * number
    forward = converted = part = 0.0
    if layout.head == "chunked":
        forward = min(logits, WIDE_AT_ONCE) * (8 if number == 2 else 4)
        converted = 4 * min(logits, 2 * WIDE_AT_ONCE) if number == 2 else 0
    summed = hidden * number
    if logits > LOGITS_AT_ONCE:
        summed, part = hidden * 4, hidden * number if number == 2 else 0
    is_tied = isinstance(architecture, BloomArchitecture) or architecture.tied_head
    if is_tied and chunk is not None and chunk.embeds:
        backward = summed + max(part, converted, min(of_weight, GRADIENT_AT_ONCE * number))
    else:
        backward = of_weight + summed + max(part, converted)
    return min(logits, LOGITS_AT_ONCE) * number + max(forward, backward)
