"""The configurations of the two runs: pretraining on texts, finetuning on English questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_xmtf.quickstart.families import Family
from megatron_xmtf.quickstart.plan import Layout, Paths, Sizes

__all__ = ["finetuning_config", "pretraining_config"]


def pretraining_config(family: Family, sizes: Sizes, paths: Paths, layout: Layout) -> dict[str, Any]:
    """Return the configuration of the pretraining: texts whole, or under the family's objectives."""
    return _run_config(
        family,
        sizes,
        paths,
        layout,
        run="pretrain",
        objectives=family.objectives,
        steps=sizes.pretrain_steps,
        lr=sizes.pretrain_lr,
        warmup=min(40, sizes.pretrain_steps),
        micro_batch_size=sizes.global_batch_size // layout.data_parallel_size,
    )


def finetuning_config(family: Family, sizes: Sizes, paths: Paths, layout: Layout) -> dict[str, Any]:
    """Return the configuration of the finetuning: the answers to English questions are the targets."""
    return _run_config(
        family,
        sizes,
        paths,
        layout,
        run="finetune",
        steps=sizes.finetune_steps,
        lr=sizes.finetune_lr,
        warmup=min(20, sizes.finetune_steps),
        # As many micro-batches as stages keep the bubble small, and more of them would cost more messages.
        micro_batch_size=sizes.global_batch_size // layout.pipeline_model_parallel_size,
    )


def _run_config(
    family: Family,
    sizes: Sizes,
    paths: Paths,
    layout: Layout,
    *,
    run: str,
    objectives: Sequence[Mapping[str, Any]] = (),
    steps: int,
    lr: float,
    warmup: int,
    micro_batch_size: int,
) -> dict[str, Any]:
    start = "initial" if run == "pretrain" else "pretrained"
    prefix = str(paths.data / run)
    return {
        "model": str(paths.checkpoints / start),
        "output": str(paths.run(run)),
        "data": {"train": [{"prefix": prefix, **objective} for objective in objectives or ({},)]},
        "batch": {
            "micro_batch_size": micro_batch_size,
            "global_batch_size": sizes.global_batch_size,
            **family.row_lengths(sizes),
        },
        "schedule": {"train_steps": steps, "lr_decay_style": "cosine", "lr_warmup_steps": warmup, "min_lr": lr / 10},
        "parallel": {
            "tensor_model_parallel_size": layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        },
        "optimizer": {"lr": lr, **family.optimizer},
        "loss": {"normalization": "target_token"},
        "precision": "fp32",
        "evaluation": {"tasks": [str(paths.tasks)]} if run == "finetune" else {},
        "logging": {"log_interval": max(1, steps // 8)},
        "seed": sizes.seed,
    }
