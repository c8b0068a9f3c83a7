"""What the parts of benchmarks/gpu.py share: timing, packed rows, errors beside those of plain torch."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""bf16; on a CPU fp16, since Triton's interpreter multiplies bf16 wrongly (`tests/kernels/interpreter.py`)."""
GIB = 2**30


HEAD_START = 2_000_000
"""Cycles that a GPU spins before what is timed, about a millisecond: Python launches a kernel in some 50 microseconds,
and a short one would otherwise wait for it between the events."""


def milliseconds(function: Callable[[], Any], *, repeats: int = 20) -> float:
    """Return the median time of a call; on a GPU between events, with the cache emptied before each."""
    function()
    if DEVICE == "cpu":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    function()
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        cache.zero_()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def peak_gib(function: Callable[[], Any]) -> float | None:
    """Return the memory that a call takes beyond what was held before; None on a CPU."""
    if DEVICE == "cpu":
        function()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def draw(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw numbers in half precision, the same for every side."""
    return torch.randn(*shape, generator=generator).to(DEVICE, HALF)


def fresh_generator() -> torch.Generator:
    """Return a generator with a seed of this moment; it is printed with the results."""
    generator = torch.Generator()
    generator.seed()
    return generator


def packed_rows(rows: int, length: int, *, mean: int, generator: torch.Generator) -> Tensor:
    """Return segment ids, int64 [rows, length]: lognormal lengths of about `mean` tokens, some padding at the end."""
    lines = []
    for _ in range(rows):
        lengths: list[int] = []
        room = length - length // 64
        while sum(lengths) < room:
            size = int(torch.empty(1).log_normal_(float(torch.tensor(mean).log()) - 0.32, 0.8, generator=generator))
            lengths.append(max(1, min(size, room - sum(lengths))))
        ids = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
        lines.append(torch.nn.functional.pad(ids, (0, length - len(ids))))
    return torch.stack(lines).to(DEVICE)


def equal_rows(rows: int, length: int, segment: int) -> Tensor:
    """Return segment ids of full rows of equal segments."""
    return (torch.arange(length) // segment + 1).expand(rows, length).to(DEVICE)


def visible_pairs(segment_ids: Tensor) -> int:
    """Return how many (query, key) pairs causal attention has, over all rows."""
    pairs = 0
    for row in segment_ids.cpu():
        counts = torch.bincount(row)[1:]
        pairs += int((counts * (counts + 1) // 2).sum())
    return pairs


def error_row(kernel: str, what: str, ours: Tensor, plain: Tensor, exact: Tensor) -> dict[str, Any]:
    """Compare errors, both against float64: that of ours may be twice that of plain torch in the same precision.

    The norm of the error is held to that. Its largest element is held to eight times plain torch's, to see a fault in
    few of them: twice would fail by the luck of single elements, in dv of torch's own fused kernel in two draws of
    eight (215,000 elements, bf16, on a CPU), where the ratio of norms stays within a few percent from draw to draw.
    """
    errors = [side.double() - exact for side in (ours, plain)]
    norms = [float(error.norm() / exact.norm().clamp(min=1e-30)) for error in errors]
    largest = [float(error.abs().max() / exact.abs().max().clamp(min=1e-30)) for error in errors]
    # NaN compares as False, so that it holds nothing.
    holds = norms[0] <= 2 * norms[1] + 1e-6 and largest[0] <= 8 * largest[1] + 1e-6
    return {
        **{"kernel": kernel, "what": what, "error": norms[0], "of plain torch": norms[1]},
        **{"largest": largest[0], "largest of plain": largest[1], "holds": holds},
    }


Part = Callable[..., Iterator[dict[str, Any]]]
"""Name of the part, smoke -> rows of its table, and notes: {"note": words} alone."""


def run(parts: dict[str, Part]) -> None:
    """Run the part that the command line names; print each row as a line of JSON as soon as it is known."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    part = parts.get(arguments.part) or parts[arguments.part.split()[0]]
    for row in part(arguments.part, smoke=arguments.smoke):
        print(json.dumps({"row": row}), flush=True)
