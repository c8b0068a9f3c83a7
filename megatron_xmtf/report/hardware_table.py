"""Word a hardware plan for a terminal: the answer, memory by stage, a step by part, better layouts, warnings last."""

from __future__ import annotations

from megatron_xmtf.planning.hardware_plan import HardwarePlan
from megatron_xmtf.planning.layout_search import SearchResult
from megatron_xmtf.planning.memory_model import GIB, KINDS, StageMemory

__all__ = ["STEP_PARTS", "shown_stages", "word_hardware_plan", "word_layout"]

STEP_PARTS = {
    # field of StepTime: words
    "matmul": "matrix products",
    "memory": "other memory traffic",
    "launch": "launches and waits",
    "tensor": "sums over tensor-parallel ranks",
    "pipeline": "handing over to the next stage",
    "bubble": "pipeline bubble",
    "data": "gradients and weights",
    "embedding": "tied embedding",
    "update": "optimizer's update",
}
TRAFFIC_WORDS = {
    "tensor": "tensor-parallel sums",
    "pipeline": "pipeline stages",
    "data": "data-parallel gradients and weights",
    "embedding": "tied embedding",
}


def word_hardware_plan(plan: HardwarePlan, *, fold: bool = True) -> str:
    """Word a plan.

    Args:    fold: of many stages show the ends, the middle and the fullest; False shows all.
    """
    parts = [_word_answer(plan), _word_memory(plan, fold=fold), _word_step(plan)]
    if plan.search is not None:
        parts.append(_word_search(plan, plan.search))
    if plan.warnings:
        parts.append(
            "\n".join(
                f"! {'refused: ' if warning['is_refused'] else ''}{warning['message']}" for warning in plan.warnings
            )
        )
    return "\n\n".join(parts)


def word_layout(plan: HardwarePlan) -> str:
    """Word the layout and what the times and sizes assume of the engine."""
    layout = plan.layout
    optimizer = f"{layout.optimizer}'s state {'shared' if layout.shards_optimizer else 'whole on each copy'}"
    if layout.offloads_optimizer:
        optimizer = f"{layout.optimizer}'s moments in the CPU's memory"
    losses = (
        f"{100 * layout.loss_fraction:.1f} % of positions have a loss"
        if plan.has_target_tokens
        else "a loss at every position, an upper bound"
    )
    return (
        f"{layout.words}; {layout.micro_batches:,} micro-batches; {layout.precision}, {layout.attention} attention, "
        f"{optimizer}; {losses}"
    )


def _word_answer(plan: HardwarePlan) -> str:
    layout, cost, cluster, time = plan.layout, plan.cost, plan.cluster, plan.time
    nodes = -(-layout.gpus // cluster.gpus_per_node)
    largest = max(plan.memory, key=lambda stage: stage.total)
    verdict = "fits" if largest.total / GIB <= cluster.memory_gib else "does not fit"
    choices = ", ".join(f"{name} {size:.1f}" for name, size in plan.by_recompute.items())
    row = f"{layout.sides[0]:,} + {layout.sides[1]:,}" if layout.sides[0] else f"{layout.sides[1]:,}"
    lines = [
        ("cluster", f"{cluster.name}: {layout.gpus} GPUs of {cluster.memory_gib:g} GiB, {nodes} nodes"),
        (
            "model",
            f"{plan.architecture.parameter_count:,} parameters; {layout.global_batch_size:,} rows of {row} tokens a "
            "step",
        ),
        ("layout", word_layout(plan)),
        (
            "memory",
            f"{largest.total / GIB:.1f} GiB on the fullest GPU (stage {largest.stage}): {verdict}; "
            f"by recomputation: {choices}",
        ),
        (
            "step",
            f"{time.seconds:,.2f} s; {cost.tokens_per_second:,.0f} tokens/s, "
            f"{cost.tokens_per_second / layout.gpus:,.0f} a GPU"
            + (f"; {cost.target_tokens_per_second:,.0f} target tokens/s" if cost.target_tokens_per_second else ""),
        ),
        (
            "speed",
            f"MFU {cost.mfu_percent:.1f} %: {cost.model_tflops_per_gpu:.1f} model TFLOP/s a GPU"
            + (
                f", {cost.hardware_tflops_per_gpu:.1f} with what is recomputed"
                if layout.recompute.granularity != "none"
                else ""
            ),
        ),
        ("run", f"{cost.steps:,} steps: {_duration(cost.hours)}, {cost.gpu_hours:,.0f} GPU hours"),
        (
            "save",
            f"{cost.checkpoint_gb:,.1f} GB a checkpoint, {cost.save_seconds:,.1f} s at "
            f"{cluster.storage_gb_per_second:g} GB/s; every {_duration(cost.save_interval_minutes / 60)} "
            f"({cost.save_interval_steps:,} steps) loses least (Young, Daly)",
        ),
    ]
    return "\n".join(f"{name:<9}{words}" for name, words in lines)


def _duration(hours: float) -> str:
    """Word a time.

    >>> [_duration(hours) for hours in (0.004, 0.5, 20.3, 700)]
    ['14 s', '30 min', '20.3 h', '29.2 days']
    """
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours / 24:,.1f} days"


def shown_stages(memory: list[StageMemory], most: int = 8) -> list[StageMemory]:
    """Choose stages to show: all of a few; of many the ends, the middle and the fullest."""
    if len(memory) <= most:
        return memory
    last = len(memory) - 1
    fullest = max(range(len(memory)), key=lambda stage: memory[stage].total)
    return [memory[stage] for stage in sorted({0, 1, last // 2, last - 1, last, fullest})]


def _word_memory(plan: HardwarePlan, *, fold: bool) -> str:
    stages = shown_stages(plan.memory) if fold else plan.memory
    lines = [
        f"{'stage':>5} {'layers':>7} {'in flight':>10}" + "".join(f"{kind:>13}" for kind in KINDS) + f"{'together':>11}"
    ]
    for stage in stages:
        lines.append(
            f"{stage.stage:>5} {stage.layers:>7} {stage.in_flight:>10}"
            + "".join(f"{getattr(stage, kind) / GIB:>13.2f}" for kind in KINDS)
            + f"{stage.total / GIB:>11.2f}"
        )
    folded = f" ({len(stages)} of {len(plan.memory)} stages)" if len(stages) < len(plan.memory) else ""
    plain = f"; a plain head would take {plan.plain_head_gib:.2f}" if not plan.layout.engine.keeps_logits else ""
    return f"memory of a GPU, GiB{folded}{plain}\n" + "\n".join(lines)


def _word_step(plan: HardwarePlan) -> str:
    time = plan.time
    lines = [f"{'a step':<34}{'seconds':>10}{'part':>8}      {'sent by a GPU':<38}{'GB':>9}{'seconds':>10}"]
    parts = [(words, getattr(time, name)) for name, words in STEP_PARTS.items()]
    traffic = [(TRAFFIC_WORDS[name], sent) for name, sent in time.sent.items()]
    for number, (words, seconds) in enumerate(parts):
        line = f"{words:<34}{seconds:>10.3f}{100 * seconds / time.seconds:>7.1f}%"
        if number < len(traffic):
            name, sent = traffic[number]
            line += f"      {name:<38}{sent.gigabytes:>9.2f}{sent.seconds:>10.3f}"
        lines.append(line)
    lines.append(f"{'together':<34}{time.seconds:>10.3f}")
    return "\n".join(lines)


def _word_search(plan: HardwarePlan, search: SearchResult) -> str:
    if not search.best:
        return f"search: none of {search.tried:,} layouts fits; {search.nearest}"
    lines = [
        f"fastest of {search.tried:,} layouts that use all {plan.layout.gpus} GPUs",
        f"{'layout':<46}{'s/step':>9}{'MFU, %':>8}{'GiB':>7}  why",
    ]
    for candidate in search.best:
        # The model's operations do not depend on the layout.
        mfu = plan.cost.mfu_percent * plan.time.seconds / candidate.time.seconds
        lines.append(
            f"{candidate.layout.words:<46}{candidate.time.seconds:>9.2f}{mfu:>8.1f}{candidate.largest_gib:>7.1f}"
            f"  {candidate.reason}"
        )
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in search.rejected.items())
    return "\n".join([*lines, f"left out: {rejected or 'none'}"])
