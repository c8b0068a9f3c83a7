"""What one quickstart does: sizes, layouts, seconds allowed for each stage, and the files under its directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import ConfigError

__all__ = ["STAGE_BUDGETS", "Layout", "Paths", "Sizes", "choose_layout", "finetuning_config", "pretraining_config"]

STAGE_BUDGETS: dict[str, int] = {
    "load": 10,
    "facts": 5,
    "render": 10,
    "model": 5,
    "preprocess": 10,
    "import": 5,
    "pack": 5,
    "pretrain": 140,
    "hand over": 5,
    "evaluate before": 15,
    "finetune": 50,
    "evaluate after": 15,
    "export": 5,
    "verify": 10,
    "report": 5,
}
"""Stage -> seconds that it may take on 2 cores, in order; 295 in all. A budget is stated, not enforced."""


@dataclass(frozen=True)
class Sizes:
    """How much data, how large a model, how many steps. The defaults are the five-minute story."""

    languages: int = 46
    text_rounds: int = 330
    """Pretraining texts of each language (English has more)."""
    english_countries: int = 100
    """Countries that only English texts and questions tell of."""
    questions_per_language: int = 12
    """Evaluation questions of each task in each language but English."""
    vocab_size: int = 4096
    """Tokens; a multiple of 256, so that nothing is padded at tp 2."""
    hidden_size: int = 128
    num_layers: int = 4
    num_attention_heads: int = 4
    sequence_length: int = 256
    """Tokens of a row."""
    global_batch_size: int = 8
    """Rows of a step. So small because a tiny model learns by the number of steps."""
    pretrain_steps: int = 580
    pretrain_lr: float = 5e-3
    finetune_steps: int = 140
    finetune_lr: float = 4e-4
    seed: int = 42


@dataclass(frozen=True)
class Layout:
    """How the model is split over local ranks."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    data_parallel_size: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.data_parallel_size

    def __str__(self) -> str:
        return (
            f"TP{self.tensor_model_parallel_size} x PP{self.pipeline_model_parallel_size} x DP{self.data_parallel_size}"
        )


@dataclass(frozen=True)
class Paths:
    """Everything that the quickstart leaves under its directory."""

    root: Path

    @property
    def data(self) -> Path:
        """Texts, rows, prompted records, task file and indexed files."""
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        """The byte-level BPE tokenizer."""
        return self.root / "tokenizer"

    @property
    def initial_hf(self) -> Path:
        """The random tiny BLOOM."""
        return self.root / "initial_hf"

    @property
    def pretrained_hf(self) -> Path:
        """The pretrained tiny BLOOM."""
        return self.root / "pretrained_hf"

    @property
    def hf(self) -> Path:
        """The finetuned model: the result."""
        return self.root / "hf"

    @property
    def checkpoints(self) -> Path:
        """Imported checkpoints; those of the runs are in the runs' own directories."""
        return self.root / "checkpoints"

    def config(self, run: str) -> Path:
        """Configuration of the run `pretrain` or `finetune`."""
        return self.root / f"{run}.yaml"

    def run(self, run: str) -> Path:
        """Output of the run `pretrain` or `finetune`."""
        return self.root / run

    @property
    def tasks(self) -> Path:
        """The task file of both evaluations."""
        return self.data / "tasks.yaml"


def choose_layout(nproc: int) -> tuple[Layout, Layout]:
    """Choose (pretraining, finetuning) layouts for some local processes.

    Finetuning and evaluation show the 3D engine: TP2 x PP2 on four. Pretraining takes what is fastest for a model
    this small, which is data parallel over no more processes than there are cores.

    Raises:  ConfigError: not 1, 2 or 4.
    """
    if nproc not in (1, 2, 4):
        raise ConfigError(
            f"--nproc {nproc}: the quickstart runs on 1 (no split), 2 (PP2) or 4 (TP2 x PP2) local processes."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data_parallel = max(size for size in (1, 2, 4) if size <= min(nproc, cores))
    finetuning = {1: Layout(1, 1, 1), 2: Layout(1, 2, 1), 4: Layout(2, 2, 1)}[nproc]
    return Layout(1, 1, data_parallel), finetuning


def pretraining_config(sizes: Sizes, paths: Paths, layout: Layout) -> dict[str, Any]:
    """Return the configuration of the pretraining: every token of the texts is a target."""
    return _run_config(
        sizes,
        paths,
        layout,
        run="pretrain",
        steps=sizes.pretrain_steps,
        lr=sizes.pretrain_lr,
        warmup=min(40, sizes.pretrain_steps),
        micro_batch_size=sizes.global_batch_size // layout.data_parallel_size,
    )


def finetuning_config(sizes: Sizes, paths: Paths, layout: Layout) -> dict[str, Any]:
    """Return the configuration of the finetuning: the answers to English questions are the targets."""
    return _run_config(
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
    sizes: Sizes, paths: Paths, layout: Layout, *, run: str, steps: int, lr: float, warmup: int, micro_batch_size: int
) -> dict[str, Any]:
    start = "initial" if run == "pretrain" else "pretrained"
    return {
        "model": str(paths.checkpoints / start),
        "output": str(paths.run(run)),
        "data": {"train": [{"prefix": str(paths.data / run)}]},
        "batch": {
            "micro_batch_size": micro_batch_size,
            "global_batch_size": sizes.global_batch_size,
            "sequence_length": sizes.sequence_length,
        },
        "schedule": {"train_steps": steps, "lr_decay_style": "cosine", "lr_warmup_steps": warmup, "min_lr": lr / 10},
        "parallel": {
            "tensor_model_parallel_size": layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        },
        "optimizer": {"lr": lr, "weight_decay": 0.01},
        "loss": {"normalization": "target_token"},
        "precision": "fp32",
        "evaluation": {"tasks": [str(paths.tasks)]} if run == "finetune" else {},
        "logging": {"log_interval": max(1, steps // 8)},
        "seed": sizes.seed,
    }
