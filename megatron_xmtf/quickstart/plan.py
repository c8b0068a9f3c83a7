"""What one quickstart does: sizes, layouts, and the files under its directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_xmtf.errors import ConfigError

__all__ = ["Layout", "Paths", "Sizes", "choose_layout"]


@dataclass(frozen=True)
class Sizes:
    """How much data, how large a model, how many steps. The defaults are those of a BLOOM in five minutes."""

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
    """Layers; of an encoder-decoder on either side."""
    num_attention_heads: int = 4
    sequence_length: int = 256
    """Tokens of a row of a decoder-only model."""
    encoder_length: int = 256
    """Tokens that an encoder-decoder reads of a row: inputs of several examples."""
    decoder_length: int = 256
    """Tokens that it writes of a row: their targets."""
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
        """The random tiny model."""
        return self.root / "initial_hf"

    @property
    def pretrained_hf(self) -> Path:
        """The pretrained tiny model."""
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
