"""Time, memory and fill of packing, beside the rules that other trainers use, in one run.

    python benchmarks/packing.py --trl-python TRL/bin/python --output benchmarks/results/packing.json

    ours                   best fit on counts of each length, then a random example for each place (one epoch)
    next_fit               Megatron-DeepSpeed t0loading `DecoderPackedMTFDataset`, derived again from its rule: a row is
                           closed when the next example of a random order does not fit
    first_fit_decreasing   longest first into the first row with room, by a tree of maxima over rows, O(N log N)
    trl_pack_dataset       `trl.pack_dataset(strategy="bfd")` as it is called: every 1,000 examples by themselves
    trl_bfd                the same packing on the whole table at once; like the former it copies the tokens too, which
                           ours leaves where they are

TRL is measured by a Python that has it (`python -m venv TRL && TRL/bin/pip install trl==1.16.0`), or not at all. Each
method runs alone in a fresh process on the same lengths; memory is the growth of that process's peak. Peers get the
lengths in the form that suits them best, outside the timed part. Ratio: peer / ours. Takes about 6 minutes and 9 GiB
with the numbers of examples by default; 80 million alone take 20 seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

CAPACITY = 2049
MEAN, SIGMA = 200, 1.0
EXAMPLES = [100_000, 1_000_000, 10_000_000, 80_000_000, 500_000_000]
SLOW_PEERS, TRL_LIMIT = 10_000_000, 1_000_000
"""Largest numbers of examples that peers are given: TRL's packing of 10 million would take 6 minutes and 28 GiB."""
BLOCK = 1 << 22


def draw_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Draw lognormal lengths of mean 200 tokens (before clipping to 1..2049), uint16 [count]."""
    random = np.random.default_rng(seed)
    lengths = np.empty(count, np.uint16)
    for begin in range(0, count, BLOCK):
        block = lengths[begin : begin + BLOCK]
        draws = random.lognormal(math.log(MEAN) - SIGMA**2 / 2, SIGMA, len(block))
        block[:] = np.clip(np.rint(draws), 1, CAPACITY)
    return lengths


def prepare_ours(lengths: np.ndarray) -> Callable[[], int]:
    """Rows and the assignment of examples to them, shuffled."""
    from megatron_xmtf.data.best_fit import pack_lengths

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
        ordered = np.argsort(-lengths.astype(np.int32), kind="stable").tolist()
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


def token_table(lengths: np.ndarray) -> Any:
    """Lists of int32 zeros of these lengths, a pyarrow table with the column `input_ids`."""
    import pyarrow  # type: ignore[import-not-found]

    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pyarrow.int32())
    tokens = pyarrow.array(np.zeros(int(lengths.sum()), np.int32))
    return pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, tokens)})


def prepare_trl_pack_dataset(lengths: np.ndarray) -> Callable[[], int]:
    """TRL's public function with its defaults, on a dataset that is in memory."""
    import datasets  # type: ignore[import-not-found]
    import trl  # type: ignore[import-not-found]

    datasets.disable_progress_bars()
    table = datasets.Dataset(datasets.table.InMemoryTable(token_table(lengths)), fingerprint=f"zeros{len(lengths)}")
    return lambda: len(trl.pack_dataset(table, CAPACITY, strategy="bfd"))


def prepare_trl_bfd(lengths: np.ndarray) -> Callable[[], int]:
    """TRL's best-fit decreasing on the whole table, called below `datasets.map`, which would only add time."""
    from trl.data_utils import _pack_bfd  # type: ignore[import-not-found]

    table = token_table(lengths)
    return lambda: len(_pack_bfd(table, CAPACITY, "truncate"))


METHODS: dict[str, tuple[Callable[[np.ndarray], Callable[[], int]], float]] = {
    "ours": (prepare_ours, math.inf),
    "next_fit": (prepare_next_fit, SLOW_PEERS),
    "first_fit_decreasing": (prepare_first_fit_decreasing, SLOW_PEERS),
    "trl_pack_dataset": (prepare_trl_pack_dataset, TRL_LIMIT),
    "trl_bfd": (prepare_trl_bfd, TRL_LIMIT),
}
TITLES = {
    "ours": "best fit by histogram (ours)",
    "next_fit": "next fit (Megatron-DeepSpeed's rule)",
    "first_fit_decreasing": "first fit, longest first",
    "trl_pack_dataset": "TRL `pack_dataset`, 1,000 at a time",
    "trl_bfd": "TRL `bfd`, whole table",
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
    tokens = int(lengths.sum(dtype=np.int64))
    return {
        "seconds": round(seconds, 4),
        "examples_per_second": round(count / seconds),
        "memory_gib": round((peak - before) / 2**20, 3),
        "rows": rows,
        "fill_fraction": round(tokens / (rows * CAPACITY), 6),
        "rows_at_least": -(-tokens // CAPACITY),
    }


def measure_apart(method: str, count: int, python: str) -> dict[str, float]:
    """Run `measure` in a fresh process of `python`."""
    command = [python, str(Path(__file__).resolve()), "--measure", method, str(count)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def compare(count: int, methods: list[str], trl_python: str | None) -> dict[str, Any]:
    """Measure ours and each peer that can take `count` lengths, and divide by ours."""
    results: dict[str, Any] = {"examples": count}
    for method in ["ours", *methods]:
        is_trl = method.startswith("trl_")
        if count > METHODS[method][1] or (is_trl and trl_python is None):
            continue
        results[method] = measure_apart(method, count, trl_python if is_trl and trl_python else sys.executable)
        ours = results["ours"]
        results[method]["seconds_ratio"] = round(results[method]["seconds"] / ours["seconds"], 1)
        results[method]["rows_ratio"] = round(results[method]["rows"] / ours["rows"], 4)
        print(f"{count:>12,} {method:<22}" + "".join(f"{value:>14,}" for value in results[method].values()), flush=True)
    return results


def versions_of(python: str, packages: list[str]) -> dict[str, str]:
    """Ask a Python for the versions of packages."""
    code = "import sys,json,importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    output = subprocess.run([python, "-c", code, *packages], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output))


def print_markdown(results: list[dict[str, Any]]) -> None:
    """Print the rows of the table in the README."""
    print("\n| rule | " + " | ".join(f"{result['examples']:,} examples" for result in results) + " |")
    print("|---" * (len(results) + 1) + "|")
    for method, title in TITLES.items():
        cells = [
            f"{result[method]['seconds']:.2f} s, {100 * result[method]['fill_fraction']:.3f} % filled, "
            f"{result[method]['memory_gib']:.2f} GiB"
            if method in result
            else "not run"
            for result in results
        ]
        print(f"| {title} | " + " | ".join(cells) + " |")


def main() -> None:
    """Compare at each number of examples, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=EXAMPLES)
    parser.add_argument("--peers", nargs="*", default=list(METHODS)[1:], choices=list(METHODS)[1:])
    parser.add_argument("--trl-python", help="a Python that has trl; without it TRL is not measured")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the results")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "EXAMPLES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    if arguments.trl_python is None:
        print("TRL is not measured: no --trl-python is given")
    columns = ["seconds", "examples/s", "memory GiB", "rows", "fill", "rows at least", "seconds ratio", "rows ratio"]
    print(f"{'examples':>12} {'method':<22}" + "".join(f"{column:>14}" for column in columns))
    versions = {"python": platform.python_version(), "numpy": importlib.metadata.version("numpy")}
    if arguments.trl_python is not None:
        versions |= versions_of(arguments.trl_python, ["trl", "datasets", "pyarrow"])
    report = {
        "benchmark": "packing",
        "date": date.today().isoformat(),
        "machine": arguments.machine,
        "versions": versions,
        "lengths": f"lognormal, mean {MEAN}, sigma {SIGMA}, clipped to 1..{CAPACITY}, seed 0",
        "capacity": CAPACITY,
        "results": [compare(count, arguments.peers, arguments.trl_python) for count in arguments.examples],
    }
    print_markdown(report["results"])
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
