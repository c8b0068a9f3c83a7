"""Search the layouts that a model can run in on a cluster, and order those that fit by the time of a step.

    tensor     divisors of heads, feed-forward, vocabulary; no more than a node has; with sequence parallelism where the
               lengths divide
    pipeline   stages that the layers divide into, as they are or with embedding and output layer counted
    virtual    1 to 4 chunks a stage, where layers and micro-batches divide
    data       what is left of the GPUs; the global batch must be whole micro-batches
    micro      1, 2, 4, 8, 16 rows
    recompute  none, selective, full

Whatever else the run's configuration says stays as it is; AdamW's state is shared over the data-parallel ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_xmtf.config.parallel import ParallelConfig, RecomputeConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.models.architecture import Architecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.layer_work import SCORES
from megatron_xmtf.planning.layout import Layout
from megatron_xmtf.planning.memory_model import GIB, StageMemory, memory_by_stage
from megatron_xmtf.planning.time_model import StepTime, step_time

__all__ = ["Candidate", "SearchResult", "search_layouts"]

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
VIRTUAL_SIZES = (1, 2, 3, 4)
GRANULARITIES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
FULL_FRACTION = 0.92
"""Part of a GPU's memory that a proposed layout may take: beyond, published runs got slower."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    memory: list[StageMemory]
    time: StepTime
    reason: str
    """Why it stands where it stands, in words."""

    @property
    def largest_gib(self) -> float:
        """GiB of the fullest rank."""
        return max(stage.total for stage in self.memory) / GIB


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    best: list[Candidate]
    tried: int
    rejected: dict[str, int]
    """Why layouts fell out, and how many."""
    nearest: str
    """The layout that fell short of memory by least, in words; empty if some fit."""


def search_layouts(architecture: Architecture, base: Layout, cluster: Cluster, *, keep: int = 5) -> SearchResult:
    """Find the fastest layouts.

    Args:    base: what does not change: GPUs, global batch, lengths, precision, optimizer. keep: how many to return;
             of layouts that differ in recomputation, micro-batch or chunks alone only the best two.
    Raises:  ConfigError: no split of this model uses all of the GPUs.
    """
    rejected: Counter[str] = Counter()
    found: list[tuple[float, Layout, list[StageMemory], StepTime]] = []
    nearest: tuple[float, Layout] | None = None
    tried = 0
    for layout in _layouts(architecture, base, cluster, rejected):
        tried += 1
        memory = memory_by_stage(architecture, layout, cluster)
        largest = max(stage.total for stage in memory) / GIB
        if largest > FULL_FRACTION * cluster.memory_gib:
            rejected["more memory than a GPU has"] += 1
            if nearest is None or largest < nearest[0]:
                nearest = (largest, layout)
            continue
        time = step_time(architecture, layout, cluster)
        found.append((time.seconds, layout, memory, time))
    if not tried:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common(3))
        raise ConfigError(
            f"no layout of this model uses all of {base.gpus} GPUs with a global batch of {base.global_batch_size} "
            f"rows: {reasons}; change --gpus or batch.global_batch_size."
        )
    found.sort(key=lambda entry: (entry[0], entry[1].words))
    best = _distinct(found, keep)
    short = ""
    if not best and nearest is not None:
        short = (
            f"{nearest[1].words} comes nearest, with {nearest[0]:.1f} GiB a GPU of {cluster.memory_gib:g} "
            f"(at most {100 * FULL_FRACTION:.0f} % is used)"
        )
    return SearchResult(
        best=[
            Candidate(layout, memory, time, _reason(number, best, cluster))
            for number, (_, layout, memory, time) in enumerate(best)
        ],
        tried=tried,
        rejected=dict(rejected.most_common()),
        nearest=short,
    )


Found = tuple[float, Layout, list[StageMemory], StepTime]


def _distinct(found: list[Found], keep: int) -> list[Found]:
    """Take the fastest, no more than two of a TP x PP."""
    taken: list[Found] = []
    seen: Counter[tuple[int, int]] = Counter()
    for entry in found:
        sizes = (entry[1].tp, entry[1].pp)
        if seen[sizes] < 2:
            seen[sizes] += 1
            taken.append(entry)
        if len(taken) == keep:
            break
    return taken


def _layouts(architecture: Architecture, base: Layout, cluster: Cluster, rejected: Counter[str]) -> Iterator[Layout]:
    for parallel in _parallels(architecture, base, cluster, rejected):
        dp = base.gpus // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        for size in MICRO_BATCH_SIZES:
            if base.global_batch_size % (size * dp):
                rejected["global batch is no whole number of micro-batches"] += 1
                continue
            micro_batches = base.global_batch_size // (size * dp)
            if parallel.virtual_pipeline_model_parallel_size and (
                micro_batches % parallel.pipeline_model_parallel_size
            ):
                rejected["micro-batches are no multiple of the stages (virtual pipeline)"] += 1
                continue
            for granularity in GRANULARITIES:
                if granularity == "selective" and not SCORES[base.attention].kept:
                    continue  # attention keeps no scores that could be left out
                yield replace(
                    base,
                    parallel=parallel,
                    micro_batch_size=size,
                    recompute=RecomputeConfig(granularity=granularity),
                )


def _parallels(
    architecture: Architecture, base: Layout, cluster: Cluster, rejected: Counter[str]
) -> Iterator[ParallelConfig]:
    limit = min(cluster.gpus_per_node, base.gpus)
    for tp in (size for size in range(1, limit + 1) if base.gpus % size == 0):
        for pp in (size for size in range(1, base.gpus // tp + 1) if base.gpus // tp % size == 0):
            for vpp in VIRTUAL_SIZES if pp > 1 else (1,):
                for parallel in _splits(base, tp, pp, vpp):
                    try:
                        architecture.check_split(parallel)
                    except ConfigError:
                        rejected["heads, vocabulary or layers do not divide"] += 1
                        continue
                    yield parallel


def _splits(base: Layout, tp: int, pp: int, vpp: int) -> Iterator[ParallelConfig]:
    """Return the ways to cut the layers: evenly, and with the ends counted as a layer each."""
    wishes = base.parallel
    splits_sequence = tp > 1 and all(length % tp == 0 for length in base.sides)
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "sequence_parallel": splits_sequence,
        "use_distributed_optimizer": base.optimizer == "adamw",
        "overlap_grad_reduce": wishes.overlap_grad_reduce,
        "overlap_param_gather": wishes.overlap_param_gather and base.optimizer == "adamw",
    }
    yield ParallelConfig(**settings)
    if pp > 1 and isinstance(base.lengths, int):
        yield ParallelConfig(
            **settings,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
        )


def _reason(number: int, found: list[Found], cluster: Cluster) -> str:
    """Word what a layout spends its time on, and what it costs against the best."""
    seconds, _, memory, time = found[number]
    largest = max(memory, key=lambda stage: stage.total)
    shares = {
        "tensor-parallel sums": time.tensor,
        "pipeline bubble": time.bubble,
        "gradients and weights sent": time.data + time.embedding,
        "handing over": time.pipeline,
        "launches": time.launch,
    }
    top = sorted(shares.items(), key=lambda item: -item[1])[:2]
    spent = ", ".join(f"{100 * value / time.seconds:.0f} % {name}" for name, value in top if value > 0.005 * seconds)
    room = 100 * largest.total / GIB / cluster.memory_gib
    behind = "" if number == 0 else f"{100 * (seconds / found[0][0] - 1):.1f} % slower; "
    return f"{behind}{spent or 'nothing but computing'}; memory {room:.0f} % full"
