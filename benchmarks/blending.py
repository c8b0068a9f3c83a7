"""Time of blending weighted datasets, and how well the order keeps their shares, beside Megatron-Core, in one run.

    python benchmarks/blending.py --output benchmarks/results/blending.json

    ours_draw    which examples of each dataset are drawn, pass by pass: shares by largest remainder, rounds in random
                 order, O(N + D log D) for each pass, of which there are at most 64 for each time through the data
    ours_all     everything from lengths to the finished index in memory: the draw, best-fit packing, the shuffled order
                 of rows, statistics
    megatron     `build_blending_indices` of megatron.core.datasets.helpers (C++): the dataset of each sample in turn,
                 always the one furthest behind its share, O(N x D); packing not included

Each runs alone in a fresh process; memory is the growth of that process's peak, without what it was given. Shares are
compared at the ends of windows of 20,480 draws, about what 2,048 rows of 2,048 tokens hold: `window` is the largest
difference between the draws of a dataset in one window and its share of them, `prefix` the same from the beginning to
the end of any window. Random order is off by a few times sqrt(draws x share), greedy order by a few draws. Takes about
9 minutes and 6 GiB with the sizes by default.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from packing import draw_lengths, memory_kib

SEQUENCE_LENGTH = 2048
DRAWS = [10_000_000, 80_000_000]
DATASETS = [10, 100, 1000]
WINDOW = 20_480


class LengthsOnly:
    """What packing asks of a dataset of pairs: its lengths."""

    kind, manifest, documents = "pairs", None, None

    def __init__(self, name: str, lengths: np.ndarray) -> None:
        self.name, self.prefix = name, Path(name)
        self.target_lengths = np.minimum(lengths, 20).astype(np.int32)
        self.input_lengths = lengths - self.target_lengths

    def __len__(self) -> int:
        return len(self.target_lengths)

    def occurrence_lengths(self, examples: np.ndarray, occurrences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the same lengths wherever an example stands."""
        return self.input_lengths[examples].astype(np.int64), self.target_lengths[examples].astype(np.int64)


def draw_weights(num_datasets: int) -> np.ndarray:
    """Draw shares with a long tail (Pareto, exponent 1), float64 [datasets], sum 1."""
    weights = np.random.default_rng(1).pareto(1.0, num_datasets) + 0.1
    return weights / weights.sum()


def make_mixture(num_draws: int, num_datasets: int) -> tuple[list[Any], Any]:
    """Make datasets of equal size, `num_draws` examples in all, and a mixture with the weights."""
    from megatron_xmtf.config.mixture import MixtureConfig, MixtureEntry

    parts = np.array_split(draw_lengths(num_draws).astype(np.int32), num_datasets)
    datasets = [LengthsOnly(f"d{number:04}", part) for number, part in enumerate(parts)]
    entries = [
        MixtureEntry(prefix=str(dataset.prefix), name=dataset.name, weight=float(weight))
        for dataset, weight in zip(datasets, draw_weights(num_datasets), strict=True)
    ]
    return datasets, MixtureConfig(entries=entries)


def run_ours_draw(num_draws: int, num_datasets: int) -> tuple[float, np.ndarray | None]:
    """Time the draw alone."""
    from megatron_xmtf.data.build_mixture import build_mixture
    from megatron_xmtf.data.mixture import MixtureDraws

    datasets, mixture = make_mixture(num_draws, num_datasets)
    start_measuring()
    started = time.perf_counter()
    built = build_mixture(datasets, mixture, sequence_length=SEQUENCE_LENGTH)
    draws = MixtureDraws(built, capacity=SEQUENCE_LENGTH + 1, seed=0)
    while sum(draws.drawn) < num_draws:
        draws.next_pass()
    return time.perf_counter() - started, None


def run_ours_all(num_draws: int, num_datasets: int) -> tuple[float, np.ndarray | None]:
    """Time everything up to the index, and return the dataset of each segment in training order."""
    from megatron_xmtf.data.packing import pack_mixture

    datasets, mixture = make_mixture(num_draws, num_datasets)
    start_measuring()
    started = time.perf_counter()
    tokens = sum(int(one.input_lengths.sum() + one.target_lengths.sum()) for one in datasets)
    rows = tokens // (SEQUENCE_LENGTH + 1)  # what the draws fill, near enough
    index = pack_mixture(datasets, mixture=mixture, sequence_length=SEQUENCE_LENGTH, rows_needed=rows, seed=0)
    return time.perf_counter() - started, index.dataset_ids


def run_megatron(num_draws: int, num_datasets: int) -> tuple[float, np.ndarray | None]:
    """Time the blending of Megatron-Core, its arrays allocated and touched before."""
    from megatron.core.datasets import helpers

    dataset_index = np.zeros(num_draws, np.int16)
    sample_index = np.zeros(num_draws, np.int64)
    weights = draw_weights(num_datasets)
    start_measuring()
    started = time.perf_counter()
    helpers.build_blending_indices(dataset_index, sample_index, weights, num_datasets, num_draws, False)
    return time.perf_counter() - started, dataset_index


METHODS = {"ours_draw": run_ours_draw, "ours_all": run_ours_all, "megatron": run_megatron}
MEMORY_BEFORE = [0]


def start_measuring() -> None:
    """Forget the peak of preparing the input."""
    Path("/proc/self/clear_refs").write_text("5")
    MEMORY_BEFORE[0] = memory_kib("VmRSS")


def deviations(dataset_ids: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Compare the draws in every window, and up to its end, with the shares; see the top of this file."""
    window = prefix = 0.0
    counted = np.zeros(len(shares))
    for begin in range(0, len(dataset_ids) - WINDOW + 1, WINDOW):
        found = np.bincount(dataset_ids[begin : begin + WINDOW].astype(np.intp), minlength=len(shares))
        counted += found
        window = max(window, float(np.abs(found - WINDOW * shares).max()))
        prefix = max(prefix, float(np.abs(counted - (begin + WINDOW) * shares).max()))
    return {
        "window_draws": round(window, 1),
        "prefix_draws": round(prefix, 1),
        "prefix_percent": round(100 * prefix / len(dataset_ids), 4),
    }


def measure(method: str, num_draws: int, num_datasets: int) -> dict[str, float]:
    """Blend once, after a warm-up on few draws. Runs in a process of its own."""
    METHODS[method](10_000, num_datasets)
    seconds, dataset_ids = METHODS[method](num_draws, num_datasets)
    peak = memory_kib("VmHWM")
    result: dict[str, float] = {
        "seconds": round(seconds, 3),
        "draws_per_second": round(num_draws / seconds),
        "memory_gib": round((peak - MEMORY_BEFORE[0]) / 2**20, 3),
    }
    return result | (deviations(dataset_ids, draw_weights(num_datasets)) if dataset_ids is not None else {})


def compare(num_draws: int, num_datasets: int) -> dict[str, Any]:
    """Measure every method, each in a fresh process."""
    results: dict[str, Any] = {"draws": num_draws, "datasets": num_datasets}
    for method in METHODS:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--measure",
            method,
            str(num_draws),
            str(num_datasets),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[method] = json.loads(output.splitlines()[-1])
        values = "".join(f"{value:>14,}" for value in results[method].values())
        print(f"{num_draws:>12,} {num_datasets:>8,} {method:<10}{values}", flush=True)
    return results


def main() -> None:
    """Compare at each number of draws and datasets, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=DRAWS)
    parser.add_argument("--datasets", type=int, nargs="+", default=DATASETS)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the results")
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "DRAWS", "DATASETS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, num_draws, num_datasets = arguments.measure
        print(json.dumps(measure(method, int(num_draws), int(num_datasets))))
        return
    columns = ["seconds", "draws/s", "memory GiB", "window draws", "prefix draws", "prefix %"]
    print(f"{'draws':>12} {'datasets':>8} {'method':<10}" + "".join(f"{column:>14}" for column in columns))
    report = {
        "benchmark": "blending",
        "date": date.today().isoformat(),
        "machine": arguments.machine,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("numpy", "megatron-core")},
        "window": WINDOW,
        "weights": "Pareto, exponent 1, plus 0.1, seed 1, normalised",
        "results": [compare(draws, datasets) for draws in arguments.draws for datasets in arguments.datasets],
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
