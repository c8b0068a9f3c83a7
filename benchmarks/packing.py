"""Time, memory and fill of packing, beside the rules that other trainers use, in one run.

    python benchmarks/packing.py --examples 100000 1000000 --output benchmarks/results/packing.json

    ours                   best fit on counts of each length, then a random example for each place (one epoch)
    next_fit               Megatron-DeepSpeed t0loading `DecoderPackedMTFDataset`, derived again from its rule: a row is
                           closed when the next example of a random order does not fit
    first_fit_decreasing   longest first into the first row with room, by a tree of maxima over rows, O(N log N)
    trl_bfd                the packing of `trl.pack_dataset(strategy="bfd")` on the whole table at once, where trl is
                           installed; it copies the tokens too, which ours leaves where they are

Each runs alone in a fresh process on the same lengths; memory is the growth of that process's peak. Peers get the
lengths in the form that suits them best, outside the timed part. Ratio: peer / ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xmtf.data.packing import pack_lengths

CAPACITY = 2049
MEAN, SIGMA = 200, 1.0
FIRST_FIT_LIMIT, TRL_LIMIT = 10_000_000, 1_000_000


def draw_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Draw lognormal lengths of mean 200 tokens (before clipping to 1..2049), int32 [count]."""
    draws = np.random.default_rng(seed).lognormal(math.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(np.rint(draws), 1, CAPACITY).astype(np.int32)


def prepare_ours(lengths: np.ndarray) -> Callable[[], int]:
    """Rows and the assignment of examples to them, shuffled."""
    return lambda: len(pack_lengths(lengths, capacity=CAPACITY, seed=0)[0]) - 1


def prepare_next_fit(lengths: np.ndarray) -> Callable[[], int]:
    """Next-fit over a random order, one Python step for each example, as the reference has it."""
    values = lengths.tolist()

    def pack() -> int:
        rows: list[tuple[int, int]] = []
        start = used = 0
        for place, example in enumerate(np.random.RandomState(0).permutation(len(values)).tolist()):
            length = values[example]
            if used + length > CAPACITY:
                rows.append((start, place))
                start, used = place, 0
            used += length
        rows.append((start, len(values)))
        return len(rows)

    return pack


def prepare_first_fit_decreasing(lengths: np.ndarray) -> Callable[[], int]:
    """First-fit decreasing with a tree whose nodes hold the largest free space below them."""

    def pack() -> int:
        ordered = np.argsort(-lengths, kind="stable").tolist()
        leaves = 1 << math.ceil(math.log2(2 * int(lengths.sum()) // CAPACITY + 2))
        free = [CAPACITY] * (2 * leaves)
        values = lengths.tolist()
        row_of = [0] * len(values)
        for example in ordered:
            length, node = values[example], 1
            while node < leaves:
                node *= 2
                if free[node] < length:
                    node += 1
            row_of[example] = node - leaves
            free[node] -= length
            node //= 2
            while node:
                left, right = free[2 * node], free[2 * node + 1]
                free[node] = left if left > right else right
                node //= 2
        return max(row_of) + 1

    return pack


def prepare_trl_bfd(lengths: np.ndarray) -> Callable[[], int]:
    """TRL's best-fit decreasing on the whole table at once (its default packs every 1,000 examples alone).

    Called below `trl.pack_dataset`, whose `datasets.map` around it would only add time.
    """
    import pyarrow  # type: ignore[import-not-found]
    from trl.data_utils import _pack_bfd  # type: ignore[import-not-found]

    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int32())
    tokens = pyarrow.array(np.zeros(int(lengths.sum()), np.int32))
    table = pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, tokens)})
    return lambda: len(_pack_bfd(table, CAPACITY, "truncate"))


METHODS = {
    "ours": (prepare_ours, math.inf),
    "next_fit": (prepare_next_fit, math.inf),
    "first_fit_decreasing": (prepare_first_fit_decreasing, FIRST_FIT_LIMIT),
    "trl_bfd": (prepare_trl_bfd, TRL_LIMIT),
}


def memory_kib(field: str) -> int:
    """Read VmRSS (now) or VmHWM (peak) of this process, KiB; Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def measure(method: str, count: int) -> dict[str, float]:
    """Pack once, after a warm-up on 1,000 lengths. Runs in a process of its own."""
    prepare = METHODS[method][0]
    prepare(draw_lengths(1_000))()
    lengths = draw_lengths(count)
    pack = prepare(lengths)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of drawing the lengths
    before = memory_kib("VmRSS")
    started = time.perf_counter()
    rows = pack()
    seconds = time.perf_counter() - started
    peak = memory_kib("VmHWM")
    return {
        "seconds": round(seconds, 4),
        "examples_per_second": round(count / seconds),
        "memory_gib": round((peak - before) / 2**20, 3),
        "rows": rows,
        "fill_fraction": round(float(lengths.sum()) / (rows * CAPACITY), 6),
        "rows_at_least": -(-int(lengths.sum()) // CAPACITY),
    }


def compare(count: int, methods: list[str]) -> dict[str, Any]:
    """Measure ours and each peer that can take `count` lengths, and divide by ours."""
    results: dict[str, Any] = {"examples": count}
    for method in ["ours", *methods]:
        if count > METHODS[method][1] or (method == "trl_bfd" and not is_installed("trl")):
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[method] = pool.apply(measure, (method, count))
        ours = results["ours"]
        results[method]["seconds_ratio"] = round(results[method]["seconds"] / ours["seconds"], 1)
        results[method]["rows_ratio"] = round(results[method]["rows"] / ours["rows"], 4)
        print(f"{count:>12,} {method:<22}" + "".join(f"{value:>14,}" for value in results[method].values()), flush=True)
    return results


def is_installed(package: str) -> bool:
    """Whether a peer can be measured here."""
    return importlib.util.find_spec(package) is not None


def main() -> None:
    """Compare at each number of examples, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--peers", nargs="*", default=list(METHODS)[1:], choices=list(METHODS)[1:])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the results")
    arguments = parser.parse_args()
    columns = ["seconds", "examples/s", "memory GiB", "rows", "fill", "rows at least", "seconds ratio", "rows ratio"]
    print(f"{'examples':>12} {'method':<22}" + "".join(f"{column:>14}" for column in columns))
    packages = [name for name in ("numpy", "trl", "datasets", "pyarrow") if is_installed(name)]
    report = {
        "benchmark": "packing",
        "date": date.today().isoformat(),
        "machine": arguments.machine,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "lengths": f"lognormal, mean {MEAN}, sigma {SIGMA}, clipped to 1..{CAPACITY}, seed 0",
        "capacity": CAPACITY,
        "results": [compare(count, arguments.peers) for count in arguments.examples],
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
