"""What a step reports: counts, rates, `metrics.jsonl`, the printed line.

step, loss, grad_norm, learning_rate     of the update; loss in nats, norm before clipping
rows, examples, tokens, target_tokens    of the global batch; tokens are not padding
fill_fraction                            tokens / (rows x sequence_length, or x encoder_length + decoder_length)
step_time_ms, tokens_per_second, target_tokens_per_second
model_tflops_per_gpu, mfu_percent        model FLOPs, `flops.py`; mfu_percent null where no peak is known
useful_tflops_per_gpu                    useful FLOPs, `flops.py`
peak_memory_gib                          the most any rank has held so far
loss_scale, skipped                      fp16's factor, else null; whether gradients overflowed: nothing updated
train_loss/<dataset>/<language>          every `logging.log_interval` steps, `group_losses.py`
loss/<dataset>/<language>                every `evaluation.interval` steps, `validation.py`
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

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths
from megatron_xmtf.data.encoder_decoder_batch import EncoderDecoderBatch
from megatron_xmtf.files import atomic_write, disk_errors
from megatron_xmtf.models.architecture import Architecture, BloomArchitecture
from megatron_xmtf.models.forward import MicroBatch
from megatron_xmtf.training.encoder_decoder_flops import model_flops_per_row, useful_flops_of_two_sides
from megatron_xmtf.training.flops import model_flops_per_token, peak_tflops, useful_flops

__all__ = ["MetricsFile", "StepCounts", "StepRates", "peak_memory_gib", "printed_line", "validation_line"]


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step, of one rank's micro-batches or summed over all data-parallel ranks."""

    rows: int
    examples: int
    tokens: int
    """Tokens that are not padding."""
    target_tokens: int
    attention_pairs: int
    """(Query, key) pairs of one segment, the key not after the query or, under prefix-LM, both of the inputs; of an
    encoder-decoder those of the decoder."""
    encoder_pairs: int = 0
    """Pairs of one encoder segment; 0 for a decoder model."""
    cross_pairs: int = 0
    """Pairs of a decoder and an encoder token of one example; 0 for a decoder model."""

    @staticmethod
    def of(batches: Sequence[MicroBatch]) -> StepCounts:
        """Count the micro-batches of one rank."""
        two_sided = [batch for batch in batches if isinstance(batch, EncoderDecoderBatch)]
        return StepCounts(
            rows=sum(len(batch.rows) for batch in batches),
            examples=sum(batch.num_examples for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            target_tokens=sum(batch.num_target_tokens for batch in batches),
            attention_pairs=sum(_seen_pairs(batch) for batch in batches),
            encoder_pairs=sum(
                _shared_pairs(batch.encoder_segment_ids, batch.encoder_segment_ids) for batch in two_sided
            ),
            cross_pairs=sum(_shared_pairs(batch.decoder_segment_ids, batch.encoder_segment_ids) for batch in two_sided),
        )


def _seen_pairs(batch: MicroBatch) -> int:
    """Count what tokens see: that at position p of its segment sees p + 1; positions of padding are 0.

    Under prefix-LM p inputs, at positions 0 to p - 1, see p (p - 1) / 2 later ones, the sum of their positions.
    """
    if isinstance(batch, EncoderDecoderBatch):
        return int(batch.decoder_position_ids.sum()) + batch.num_target_tokens
    later = 0 if batch.prefix_mask is None else int(batch.position_ids[batch.prefix_mask].sum())
    return int(batch.position_ids.sum()) + batch.num_tokens + later


def _shared_pairs(queries: torch.Tensor, keys: torch.Tensor) -> int:
    """Count pairs of tokens of one segment in rows [micro_batch, q] and [micro_batch, k], padding left out."""
    size = int(torch.maximum(queries.max(), keys.max())) + 1
    counts = [
        torch.bincount(q, minlength=size)[1:] @ torch.bincount(k, minlength=size)[1:]
        for q, k in zip(queries.cpu(), keys.cpu(), strict=True)
    ]
    return int(sum(counts))


@dataclass(frozen=True)
class StepRates:
    """Turns the counts and the time of a step into rates.

    Args:  peak_tflops: of one GPU; None takes that of this device from the table, where it is there.
    """

    architecture: Architecture
    sequence_length: RowLengths
    """Tokens of a row; of both sides for an encoder-decoder."""
    world_size: int
    precision: str
    peak_tflops: float | None = None

    def of(self, counts: StepCounts, *, seconds: float) -> dict[str, float | None]:
        """Return the rates of a step; counts are those of all ranks, seconds wall time."""
        row_tokens, per_row, useful = self._flops(counts)
        computed_tokens = counts.rows * row_tokens
        gpu_teraseconds = seconds * self.world_size * 1e12
        tflops = per_row * counts.rows / gpu_teraseconds
        peak = self.peak_tflops or device_peak_tflops(self.precision)
        return {
            "fill_fraction": counts.tokens / computed_tokens,
            "step_time_ms": seconds * 1e3,
            "tokens_per_second": counts.tokens / seconds,
            "target_tokens_per_second": counts.target_tokens / seconds,
            "model_tflops_per_gpu": tflops,
            "mfu_percent": None if peak is None else 100 * tflops / peak,
            "useful_tflops_per_gpu": useful / gpu_teraseconds,
        }

    def _flops(self, counts: StepCounts) -> tuple[int, float, float]:
        """Return the tokens of a row, its model FLOPs, and the useful FLOPs of a step."""
        architecture, lengths = self.architecture, self.sequence_length
        if isinstance(architecture, BloomArchitecture):
            assert isinstance(lengths, int), "a decoder's row has one length"
            useful = useful_flops(
                architecture,
                tokens=counts.tokens,
                attention_pairs=counts.attention_pairs,
                target_tokens=counts.target_tokens,
            )
            return lengths, lengths * model_flops_per_token(architecture, sequence_length=lengths), useful
        assert isinstance(lengths, EncoderDecoderLengths), "an encoder-decoder's row has two lengths"
        useful = useful_flops_of_two_sides(
            architecture,
            encoder_tokens=counts.tokens - counts.target_tokens,
            target_tokens=counts.target_tokens,
            encoder_pairs=counts.encoder_pairs,
            decoder_pairs=counts.attention_pairs,
            cross_pairs=counts.cross_pairs,
        )
        e, d = lengths.encoder_length, lengths.decoder_length
        return e + d, model_flops_per_row(architecture, encoder_length=e, decoder_length=d), useful


def device_peak_tflops(precision: str) -> float | None:
    """Return the peak of this rank's GPU where the table has it."""
    if not torch.cuda.is_available():
        return None
    return peak_tflops(torch.cuda.get_device_name(), precision=precision)


def peak_memory_gib() -> float:
    """Return the most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


def printed_line(metrics: Mapping[str, Any], *, train_steps: int, eta_seconds: float) -> str:
    """Word a step as one line with fixed columns; `mfu` and `scale` stand there where they mean something."""
    width = len(str(train_steps))
    norm, mfu = metrics["grad_norm"], metrics["mfu_percent"]
    mfu_column = "" if mfu is None else f"  mfu {mfu:4.1f}%"
    scale = metrics["loss_scale"]
    scale_column = "" if scale is None else f"  scale {scale:8.6g}"
    return (
        f"step {metrics['step']:>{width}}/{train_steps}  loss {metrics['loss']:8.4f}  "
        f"norm {'-' if norm is None else format(norm, '.3f'):>8}  lr {metrics['learning_rate']:.2e}  "
        f"fill {metrics['fill_fraction']:6.1%}  {metrics['step_time_ms']:7.0f} ms  "
        f"{metrics['tokens_per_second']:9,.0f} tok/s  {metrics['target_tokens_per_second']:8,.0f} target tok/s  "
        f"{metrics['model_tflops_per_gpu']:7.3f} TFLOP/s{mfu_column}  {metrics['peak_memory_gib']:6.2f} GiB"
        f"{scale_column}  eta {_clock(eta_seconds):>8}{'  skipped' if metrics['skipped'] else ''}"
    )


def validation_line(step: int, losses: Mapping[str, float]) -> str:
    """Word the validation losses of a step, the mean of each dataset first, its languages in brackets.

    A language's key is its dataset's with one part more; names of datasets may hold slashes themselves.
    """
    words, dataset = [f"step {step} validation"], None
    for key, value in losses.items():
        name = key.removeprefix("loss/")
        language = name.removeprefix(f"{dataset}/") if dataset is not None and name.startswith(f"{dataset}/") else ""
        if language and "/" not in language:
            words.append(f"({language} {value:.4f})")
        else:
            dataset = name
            words.append(f"{name} {value:.4f}")
    return "  ".join(words)


class MetricsFile:
    """`metrics.jsonl` of a run: one object a line, appended; lines after the resumed step are cut off first."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                step = _step_of(line)
                if step is not None and step <= resumed_step:
                    kept.append(line)
        with atomic_write(path) as stream:
            stream.writelines(line + "\n" for line in kept)
        # Not buffered: what a full disk refused is not tried again when the file is closed.
        self._path, self._stream = path, open(path, "ab", buffering=0)

    def record(self, values: Mapping[str, Any]) -> None:
        """Write one line, visible to readers at once.

        Raises:  DiskFullError: no space; half a line may be there, which the next start cuts off.
        """
        left = memoryview((json.dumps(values) + "\n").encode("utf-8"))
        with disk_errors(self._path):
            while left:
                left = left[self._stream.write(left) :]

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: str) -> int | None:
    """Return the step of a line; None of half a line, as a killed run, a full disk or a power loss leaves it."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
