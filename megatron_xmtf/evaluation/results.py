"""What an evaluation found: one figure a task, dataset, language, template and metric; `results.json`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.files import write_json

__all__ = ["EvaluatedModel", "TaskResult", "results_mapping", "write_results"]

VERSIONED = ("megatron_xmtf", "megatron-core", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class TaskResult:
    """One figure."""

    task: str
    dataset: str
    language: str
    template: str
    """Empty where the records name none."""
    template_language: str
    metric: str
    value: float
    """Fraction, 0 to 1."""
    stderr: float | None
    """Standard error of `value` over examples; None for a single example."""
    n: int
    """Examples."""
    chance: float
    """What guessing gives, fraction."""
    majority: float
    """What the best constant answer gives, fraction."""
    normalization: str = "none"
    """What a choice's score was divided by; `none` for generated answers."""
    num_truncated: int = 0
    """Examples whose inputs lost tokens on the left to fit the model."""


@dataclass(frozen=True)
class EvaluatedModel:
    """Which model was asked."""

    model: str
    """Path as the user gave it."""
    step: int | None
    """Optimizer steps of the checkpoint; None for a Hugging Face directory."""
    config_hash: str | None
    """SHA-256 of the run's resolved configuration; None where there was no run."""


def results_mapping(model: EvaluatedModel, results: Sequence[TaskResult]) -> dict[str, Any]:
    """Return what `results.json` holds."""
    versions = {name: _version(name) for name in VERSIONED}
    return {
        **asdict(model),
        "versions": {"python": platform.python_version(), **versions},
        "results": [asdict(result) for result in results],
    }


def write_results(path: Path | str, model: EvaluatedModel, results: Sequence[TaskResult]) -> None:
    """Write `results.json`, atomically."""
    write_json(path, results_mapping(model, results))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
