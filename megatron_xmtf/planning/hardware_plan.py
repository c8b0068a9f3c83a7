"""The hardware plan of a run: what each GPU holds, how long a step and the run take, what it costs.

configuration + model + cluster + GPUs  ->  memory by stage, step by part, traffic by kind, hours, checkpoints
                                        ->  warnings, and with a search the layouts that would do better
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.models.architecture import Architecture
from megatron_xmtf.planning.cluster import Cluster
from megatron_xmtf.planning.layout import AttentionKind, Layout, base_layout, layout_of
from megatron_xmtf.planning.layout_search import SearchResult, search_layouts
from megatron_xmtf.planning.layout_warnings import LayoutWarning, layout_warnings
from megatron_xmtf.planning.memory_model import GIB, StageMemory, head_bytes, memory_by_stage
from megatron_xmtf.planning.time_model import (
    StepTime,
    hardware_flops_per_row,
    model_flops,
    step_time,
    tflops_per_gpu,
)

__all__ = ["HardwarePlan", "RunCost", "plan_hardware", "young_daly_seconds"]

CHECKPOINT_BYTES = {"fp32": 12, "bf16": 14, "fp16": 14}
"""Bytes a parameter of a checkpoint with AdamW's state: BLOOM-176B's had 2.3 TB, 14 bytes (bigscience tr11 README)."""


@dataclass(frozen=True)
class RunCost:
    """What a run takes from beginning to end, and how to save it."""

    steps: int
    tokens_per_step: float
    """Of whole rows, on average over a batch-size ramp."""
    tokens_per_second: float
    """Of whole rows, at the full global batch."""
    target_tokens_per_second: float | None
    """None where the data was not planned."""
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    """With what is computed again."""
    mfu_percent: float
    hours: float
    gpu_hours: float
    checkpoint_gb: float
    save_seconds: float
    """At the cluster's storage rate, if training waited for all of it."""
    save_interval_minutes: float
    """Young and Daly's: the square root of 2 x time of a save x time between failures."""
    save_interval_steps: int
    """The same in steps."""


@dataclass(frozen=True)
class HardwarePlan:
    """What `xmtf plan --cluster` says."""

    architecture: Architecture
    layout: Layout
    cluster: Cluster
    memory: list[StageMemory]
    time: StepTime
    cost: RunCost
    warnings: list[LayoutWarning]
    by_recompute: dict[str, float]
    """GiB of the fullest rank under each choice of recomputation."""
    plain_head_gib: float
    """What a plain head would hold, all logits at once; the plan's is in `memory`."""
    search: SearchResult | None
    has_target_tokens: bool
    """`layout.loss_fraction` is the data plan's; otherwise 1 is an upper bound."""

    @property
    def fits(self) -> bool:
        """Whether nothing is refused."""
        return not any(warning["is_refused"] for warning in self.warnings)

    def to_mapping(self) -> dict[str, Any]:
        """Return what `--json` prints under `hardware`."""
        return {
            "model": {**self.architecture.to_mapping(), "parameters": self.architecture.parameter_count},
            "cluster": self.cluster.model_dump(),
            "gpus": self.layout.gpus,
            "layout": layout_mapping(self.layout),
            "fits": self.fits,
            "memory": [stage.to_mapping() for stage in self.memory],
            "largest_gib": max(stage.total for stage in self.memory) / GIB,
            "largest_gib_by_recompute": self.by_recompute,
            "logits_gib": {"ours": self.memory[-1].logits / GIB, "plain": self.plain_head_gib},
            "step": time_mapping(self.time),
            "run": asdict(self.cost),
            "warnings": self.warnings,
            "search": None if self.search is None else _search_mapping(self.search),
        }


def plan_hardware(
    config: RunConfig,
    architecture: Architecture,
    cluster: Cluster,
    *,
    gpus: int,
    attention: AttentionKind | None = None,
    loss_fraction: float | None = None,
    search: int = 0,
) -> HardwarePlan:
    """Plan a run on a cluster; nothing is built or read.

    Args:    gpus: that the run gets. attention: None: what the configuration's kernels do on a GPU.
             loss_fraction: part of all positions that has a loss, from the data plan; None: unknown, all are counted.
             search: how many better layouts to look for; where the configured one does not divide, the best takes its
             place.
    Raises:  ConfigError: the layout does not divide the model, the GPUs or the batch.
    """
    fraction = 1.0 if loss_fraction is None else loss_fraction
    found, replaced = None, ""
    if search:
        base = base_layout(config, gpus=gpus, loss_fraction=fraction, attention=attention)
        found = search_layouts(architecture, base, cluster, keep=search)
    try:
        architecture.check_split(config.parallel)
        layout = layout_of(config, gpus=gpus, loss_fraction=fraction, attention=attention)
    except ConfigError as error:
        if found is None or not found.best:
            raise
        layout, replaced = found.best[0].layout, str(error)
    memory, time = memory_by_stage(architecture, layout, cluster), step_time(architecture, layout, cluster)
    return HardwarePlan(
        architecture=architecture,
        layout=layout,
        cluster=cluster,
        memory=memory,
        time=time,
        cost=run_cost(config, architecture, layout, cluster, time, knows_targets=loss_fraction is not None),
        warnings=[*_replaced(replaced, layout), *layout_warnings(architecture, layout, cluster, memory, time)],
        by_recompute=_by_recompute(architecture, layout, cluster),
        plain_head_gib=head_bytes(architecture, layout, plain=True) / GIB,
        search=found,
        has_target_tokens=loss_fraction is not None,
    )


def _replaced(why: str, layout: Layout) -> list[LayoutWarning]:
    """Say that another layout than the configured one is planned, if it is."""
    if not why:
        return []
    message = f"planned is the fastest layout found, {layout.words}, for the configured one cannot run: {why}"
    return [{"kind": "replaced", "is_refused": False, "message": message}]


def _by_recompute(architecture: Architecture, layout: Layout, cluster: Cluster) -> dict[str, float]:
    found = {}
    for granularity in ("none", "selective", "full"):
        recompute = layout.recompute
        if granularity != recompute.granularity:
            recompute = type(recompute)(granularity=granularity)
        memory = memory_by_stage(architecture, replace(layout, recompute=recompute), cluster)
        found[granularity] = max(stage.total for stage in memory) / GIB
    return found


def run_cost(
    config: RunConfig,
    architecture: Architecture,
    layout: Layout,
    cluster: Cluster,
    time: StepTime,
    *,
    knows_targets: bool,
) -> RunCost:
    """Add up a run; the small steps of a batch-size ramp are timed as they are."""
    tokens = sum(layout.sides)
    hours = _run_seconds(config, architecture, layout, cluster, time) / 3600
    flops = model_flops(architecture, layout)
    hardware = hardware_flops_per_row(architecture, layout) * layout.global_batch_size
    tflops = tflops_per_gpu(flops, seconds=time.seconds, gpus=layout.gpus)
    parameters = architecture.parameter_count
    size = CHECKPOINT_BYTES[layout.precision] * parameters
    if layout.optimizer == "adafactor":
        # Rows and columns of matrices are next to nothing; weights, and fp32 ones beside those of half precision.
        size = (6 if layout.precision != "fp32" else 4) * parameters
    save = size / 1e9 / cluster.storage_gb_per_second
    nodes = -(-layout.gpus // cluster.gpus_per_node)
    interval = young_daly_seconds(save, cluster.node_hours_between_failures * 3600 / nodes)
    per_second = layout.global_batch_size * tokens / time.seconds
    targets = layout.global_batch_size * layout.sides[1] * layout.loss_fraction / time.seconds
    return RunCost(
        steps=config.train_steps,
        tokens_per_step=config.train_rows * tokens / config.train_steps,
        tokens_per_second=per_second,
        target_tokens_per_second=targets if knows_targets else None,
        model_tflops_per_gpu=tflops,
        hardware_tflops_per_gpu=tflops_per_gpu(hardware, seconds=time.seconds, gpus=layout.gpus),
        mfu_percent=100 * tflops / cluster.peak_tflops,
        hours=hours,
        gpu_hours=hours * layout.gpus,
        checkpoint_gb=size / 1e9,
        save_seconds=save,
        save_interval_minutes=interval / 60,
        save_interval_steps=max(1, round(interval / time.seconds)),
    )


def _run_seconds(
    config: RunConfig, architecture: Architecture, layout: Layout, cluster: Cluster, time: StepTime
) -> float:
    """Return the seconds of all steps, each as large as the ramp makes it."""
    rows = config.batch.step_rows
    if len(rows.sizes) == 1:
        return config.train_steps * time.seconds
    seconds, step = 0.0, 0
    while step < config.train_steps:
        size, last = rows.of(step), step
        while last < config.train_steps and rows.of(last) == size:
            # To the end of this size: steps of one size are neighbours.
            last = last + 1 if size != rows.global_batch_size else config.train_steps
        one = step_time(architecture, replace(layout, global_batch_size=size), cluster)
        seconds += (last - step) * one.seconds
        step = last
    return seconds


def young_daly_seconds(save_seconds: float, seconds_between_failures: float) -> float:
    """Return how often to save: the square root of 2 x (time of a save) x (time between failures).

    >>> round(young_daly_seconds(40, 112 * 3600) / 60)
    95

    Source:  Young 1974; Daly 2006.
    """
    return math.sqrt(2 * save_seconds * seconds_between_failures)


def layout_mapping(layout: Layout) -> dict[str, Any]:
    """Return a layout as `--json` prints it; `overrides` are what `xmtf train` takes."""
    parallel = layout.parallel.model_dump(exclude_defaults=True)
    overrides = [f"parallel.{key}={_word(value)}" for key, value in parallel.items()]
    overrides += [f"batch.micro_batch_size={layout.micro_batch_size}"]
    overrides += [f"recompute.granularity={layout.recompute.granularity}"]
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "data_parallel_size": layout.dp,
        "sequence_parallel": layout.parallel.sequence_parallel,
        "use_distributed_optimizer": layout.shards_optimizer,
        "micro_batch_size": layout.micro_batch_size,
        "micro_batches": layout.micro_batches,
        "recompute": layout.recompute.granularity,
        "attention": layout.attention,
        "loss_fraction": layout.loss_fraction,
        "overrides": overrides,
    }


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def time_mapping(time: StepTime) -> dict[str, Any]:
    """Return a step's time as `--json` prints it: seconds by part, traffic by kind."""
    parts = ("matmul", "memory", "launch", "tensor", "pipeline", "bubble", "data", "embedding", "update", "imbalance")
    return {
        "seconds": time.seconds,
        **{f"{name}_seconds": getattr(time, name) for name in parts},
        "bubble_fraction": time.bubble_fraction,
        "traffic": {name: asdict(traffic) for name, traffic in time.sent.items()},
    }


def _search_mapping(search: SearchResult) -> dict[str, Any]:
    return {
        "tried": search.tried,
        "rejected": search.rejected,
        "nearest": search.nearest,
        "best": [
            {
                "layout": layout_mapping(candidate.layout),
                "step": time_mapping(candidate.time),
                "largest_gib": candidate.largest_gib,
                "reason": candidate.reason,
            }
            for candidate in search.best
        ],
    }
