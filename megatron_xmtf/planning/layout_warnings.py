"""Say what is wrong with a layout: what cannot run, and what runs worse than it need.

kind       refused                                        warned of
memory     more than a GPU has                            over 92 % of it: slower, not only riskier
tensor     a group larger than a node
batch      (an error: `layout.check_batch`)               fewer micro-batches than stages; a large bubble
heads                                                     head_dim no multiple of 64, or of 8
balance                                                   the slowest stage is much slower than the average
interleave micro-batches no multiple of the stages

Source:  bigscience, train/tr11-176B-ml/chronicles-prequel.md: 128 heads of 108 at hidden_size 13,824 made 110 TFLOP/s
         of 152; 8 rows a micro-batch at 75 GB of 80 made 88 of 98; the embedding counted as a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from megatron_xmtf.models.architecture import Architecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.memory_model import GIB, StageMemory
from megatron_xmtf.planning.time_model import StepTime

__all__ = ["LayoutWarning", "layout_warnings"]

NEAR_FULL_FRACTION = 0.92
LARGE_BUBBLE_FRACTION = 0.15
IMBALANCE_FRACTION = 0.08


class LayoutWarning(TypedDict):
    """One thing to look at."""

    kind: str
    is_refused: bool
    """The layout cannot run; the others run, and badly."""
    message: str


def layout_warnings(
    architecture: Architecture, layout: Layout, cluster: Cluster, memory: list[StageMemory], time: StepTime
) -> list[LayoutWarning]:
    """Find what is worth a word, refusals first."""
    found = [
        *_memory(layout, cluster, memory),
        *_tensor(layout, cluster),
        *_pipeline(architecture, layout, time),
        *_heads(architecture),
    ]
    warnings: list[LayoutWarning] = [
        {"kind": kind, "is_refused": refused, "message": message} for kind, refused, message in found
    ]
    return sorted(warnings, key=lambda warning: not warning["is_refused"])


Found = Iterator[tuple[str, bool, str]]


def _memory(layout: Layout, cluster: Cluster, memory: list[StageMemory]) -> Found:
    largest = max(memory, key=lambda stage: stage.total)
    needed = largest.total / GIB
    if needed > cluster.memory_gib:
        yield (
            "memory",
            True,
            f"stage {largest.stage} needs {needed:.1f} GiB a GPU, {cluster.name} has {cluster.memory_gib:g}: "
            f"{_remedy(layout, largest)}.",
        )
    elif needed > NEAR_FULL_FRACTION * cluster.memory_gib:
        yield (
            "memory",
            False,
            f"stage {largest.stage} needs {needed:.1f} of {cluster.memory_gib:g} GiB: so near the end the allocator "
            "gives memory back and asks again, which is slow, and little more ends the run; lower "
            "batch.micro_batch_size.",
        )
    if layout.attention in ("reference", "sdpa") and layout.recompute.granularity != "none":
        kept = sum(stage.activations for stage in memory) / len(memory) / GIB
        if kept > 0.3 * cluster.memory_gib:
            yield (
                "attention",
                False,
                f"activations take {kept:.0f} GiB on average: kernels.attention={layout.attention} keeps a dense fp32 "
                "bias for each micro-batch in flight, which a fused kernel does not (see --attention fused).",
            )


def _remedy(layout: Layout, stage: StageMemory) -> str:
    """Name the largest kind of memory, and what makes it smaller."""
    kinds = {kind: getattr(stage, kind) for kind in ("weights", "gradients", "optimizer", "activations", "logits")}
    kind = max(kinds, key=lambda name: kinds[name])
    if kind == "optimizer" and not layout.shards_optimizer and layout.dp > 1 and layout.optimizer == "adamw":
        return "most is optimizer state; set parallel.use_distributed_optimizer=true"
    if kind == "activations" and layout.recompute.granularity != "full":
        return "most is activations; set recompute.granularity=full, or lower batch.micro_batch_size"
    if kind in ("activations", "logits") and layout.micro_batch_size > 1:
        return f"most is {kind}; lower batch.micro_batch_size={layout.micro_batch_size}"
    return f"most is {kind}; raise the tensor- or pipeline-parallel size (--search finds how)"


def _tensor(layout: Layout, cluster: Cluster) -> Found:
    if layout.tp > cluster.gpus_per_node:
        yield (
            "tensor",
            True,
            f"tensor_model_parallel_size={layout.tp} is more than the {cluster.gpus_per_node} GPUs of a node: every "
            "layer would wait for the network, four times a micro-batch.",
        )


def _pipeline(architecture: Architecture, layout: Layout, time: StepTime) -> Found:
    if layout.vpp > 1 and layout.micro_batches % layout.pp:
        yield (
            "interleave",
            True,
            f"{layout.micro_batches} micro-batches are no multiple of {layout.pp} stages, which a virtual pipeline "
            "needs: change batch.global_batch_size, or leave virtual_pipeline_model_parallel_size out.",
        )
    if layout.pp > 1 and layout.micro_batches < layout.pp:
        yield (
            "batch",
            False,
            f"{layout.micro_batches} micro-batches do not fill {layout.pp} stages once: raise batch.global_batch_size, "
            "or use fewer stages.",
        )
    elif time.bubble_fraction > LARGE_BUBBLE_FRACTION:
        yield (
            "bubble",
            False,
            f"{100 * time.bubble_fraction:.0f} % of a step is the pipeline's bubble: more micro-batches a step, fewer "
            "stages, or a virtual pipeline make it smaller.",
        )
    busy = time.matmul + time.memory + time.launch + time.tensor + time.pipeline
    if time.imbalance > IMBALANCE_FRACTION * busy:
        seconds = [sum(chunk.seconds for chunk in chunks) for chunks in time.chunks]
        slowest = seconds.index(max(seconds))
        part = f"stages wait {100 * time.imbalance / busy:.0f} % of the time for stage {slowest}"
        ends = slowest in (0, layout.pp - 1)
        why = (
            f", which has the {'output layer' if slowest else 'embedding'} of {architecture.padded_vocab_size:,} words "
            "on top of its layers"
            if ends
            else ""
        )
        yield "balance", False, f"{part}{why}: {_balance_remedy(layout)}."


def _balance_remedy(layout: Layout) -> str:
    if layout.parallel.pipeline_layers is not None:
        return "leave parallel.pipeline_layers out, and layers are cut by cost"
    if layout.parallel.uneven_keys or not isinstance(layout.lengths, int):
        upper = "; without the data every position counts as one with a loss" if layout.loss_fraction == 1 else ""
        return f"a larger tensor-parallel size or fewer stages make it smaller{upper}"
    return (
        "count embedding and output layer as layers (parallel.account_for_embedding_in_pipeline_split and "
        "account_for_loss_in_pipeline_split), or give the ends fewer (num_layers_in_last_pipeline_stage)"
    )


def _heads(architecture: Architecture) -> Found:
    size = architecture.head_dim
    if size % 8:
        yield (
            "heads",
            False,
            f"head_dim={size} is no multiple of 8: matrix products of attention cannot use tensor cores well (heads of "
            "108 made 110 TFLOP/s where heads of 144 made 152).",
        )
    elif size % 64:
        yield (
            "heads",
            False,
            f"head_dim={size} is no multiple of 64: attention kernels pad it to the next.",
        )
