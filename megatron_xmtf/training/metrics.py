"""What a step reports: counts, rates and model FLOPs; `metrics.jsonl` and the printed line.

Model FLOPs follow Megatron-LM's convention: forward and backward, full (not causal) attention, the output layer
included, recomputation not.  FLOPs of a token = 72 l h^2 (1 + s / 6h + V / 12lh).
Source:  Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
         section 5.1 (there with recomputation: 96 and V / 16lh).
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.data.batch import Batch
from megatron_xmtf.files import atomic_write
from megatron_xmtf.models.architecture import BloomArchitecture

__all__ = [
    "MetricsFile",
    "StepCounts",
    "model_flops_per_token",
    "peak_memory_gib",
    "printed_line",
    "step_metrics",
    "validation_line",
]

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peak of GPUs by a part of their name, from NVIDIA's data sheets (SXM parts)."""


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step, of one rank's micro-batches or summed over all data-parallel ranks."""

    rows: int
    examples: int
    tokens: int
    """Tokens that are not padding."""
    target_tokens: int

    @staticmethod
    def of(batches: Sequence[Batch]) -> StepCounts:
        """Count the micro-batches of one rank."""
        return StepCounts(
            rows=sum(len(batch.rows) for batch in batches),
            examples=sum(batch.num_examples for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            target_tokens=sum(batch.num_target_tokens for batch in batches),
        )


def model_flops_per_token(architecture: BloomArchitecture, *, sequence_length: int) -> float:
    """Return the FLOPs of forward and backward for one token of a row; the formula is in the module's docstring."""
    hidden, layers = architecture.hidden_size, architecture.num_layers
    attention = sequence_length / (6 * hidden)
    head = architecture.padded_vocab_size / (12 * layers * hidden)
    return 72.0 * layers * hidden**2 * (1 + attention + head)


def peak_memory_gib() -> float:
    """Return the most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


def step_metrics(
    *,
    step: int,
    loss: float,
    grad_norm: float | None,
    learning_rate: float,
    counts: StepCounts,
    seconds: float,
    flops_per_token: float,
    sequence_length: int,
    world_size: int,
) -> dict[str, Any]:
    """Return one object of `metrics.jsonl`; the key names are the contract of DESIGN 7.

    Args:    counts: over all ranks. seconds: wall time of the step. loss: nats. grad_norm: before clipping.
    """
    computed_tokens = counts.rows * sequence_length
    tflops = flops_per_token * computed_tokens / seconds / world_size / 1e12
    peak = _peak_tflops()
    return {
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "rows": counts.rows,
        "examples": counts.examples,
        "tokens": counts.tokens,
        "target_tokens": counts.target_tokens,
        "fill_fraction": counts.tokens / computed_tokens,
        "step_time_ms": seconds * 1e3,
        "tokens_per_second": counts.tokens / seconds,
        "target_tokens_per_second": counts.target_tokens / seconds,
        "model_tflops_per_gpu": tflops,
        "mfu_percent": None if peak is None else 100 * tflops / peak,
        "peak_memory_gib": peak_memory_gib(),
    }


def printed_line(metrics: Mapping[str, Any], *, train_steps: int, eta_seconds: float) -> str:
    """Word a step as one line with fixed columns."""
    width = len(str(train_steps))
    norm = metrics["grad_norm"]
    return (
        f"step {metrics['step']:>{width}}/{train_steps}  loss {metrics['loss']:8.4f}  "
        f"norm {'-' if norm is None else format(norm, '8.3f')}  lr {metrics['learning_rate']:.2e}  "
        f"fill {metrics['fill_fraction']:6.1%}  {metrics['step_time_ms']:7.0f} ms  "
        f"{metrics['tokens_per_second']:9,.0f} tok/s  {metrics['target_tokens_per_second']:8,.0f} target tok/s  "
        f"{metrics['peak_memory_gib']:5.2f} GiB  eta {_clock(eta_seconds)}"
    )


def validation_line(step: int, losses: Mapping[str, float]) -> str:
    """Word the validation losses of a step, the mean of each dataset first, its languages in brackets."""
    words = [f"step {step} validation"]
    for key, value in losses.items():
        parts = key.split("/")[1:]
        words.append(f"{parts[0]} {value:.4f}" if len(parts) == 1 else f"({parts[1]} {value:.4f})")
    return "  ".join(words)


class MetricsFile:
    """`metrics.jsonl` of a run: one object a line, appended; lines after the resumed step are cut off first."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                # The last line of a killed run may be half a line.
                if line.endswith("}") and json.loads(line)["step"] <= resumed_step:
                    kept.append(line)
        with atomic_write(path) as stream:
            stream.writelines(line + "\n" for line in kept)
        self._stream = open(path, "a", encoding="utf-8", buffering=1)

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line, visible to readers at once."""
        self._stream.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _peak_tflops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
