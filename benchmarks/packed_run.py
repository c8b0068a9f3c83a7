"""What a packing index costs a run: building, storing, opening it in every rank, and reading batches, in one run.

    python benchmarks/packed_run.py --output benchmarks/results/packed_run.json

Datasets of pairs are written in the format of `xmtf preprocess`, with lognormal lengths. The large ones have token
files of the right size without contents (sparse), as opening and packing read only lengths. Then
    build     `build_packing_index`: lengths, draw, packing, files with SHA-256, opened again and verified
    ranks     processes that open the datasets and the index at once, as training ranks do: verified by each
              (`verify=True`), or mapped (`verify=False`, after one has verified it). Memory is what the process has for
              itself (RssAnon); pages of files are shared by all
    loader    one process reads batches of packed rows (targets weighted, position and segment ids) from a small
              dataset with real tokens in the page cache
Takes about 3 minutes, 4 GB of disk and 4 GiB of memory with the number of examples by default.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import queue
import struct
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from packing import draw_lengths

SEQUENCE_LENGTH = 2048
NUM_DATASETS = 10
LOADER_EXAMPLES, LOADER_STEPS = 200_000, 20
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 512, 4
SAMPLE_SECONDS = 0.02


def write_half(prefix: Path, lengths: np.ndarray, *, with_tokens: bool) -> None:
    """Write `<prefix>.idx` and `.bin` for sequences of these lengths, uint16 tokens."""
    count, ends = len(lengths), np.cumsum(lengths, dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1))
        stream.write(lengths.astype("<i4").data)
        stream.write((2 * (ends - lengths)).astype("<i8").data)
        stream.write(np.arange(count + 1, dtype="<i8").data)
    with open(f"{prefix}.bin", "wb") as stream:
        if with_tokens:
            stream.write(np.random.default_rng(0).integers(3, 50_000, int(ends[-1]), dtype=np.uint16).data)
        else:
            stream.truncate(2 * int(ends[-1]))


def write_datasets(directory: Path, count: int, *, num_datasets: int, with_tokens: bool) -> list[str]:
    """Write datasets of pairs, `count` examples in all; return their prefixes."""
    prefixes = []
    for number, lengths in enumerate(np.array_split(draw_lengths(count), num_datasets)):
        prefix = directory / f"d{number}"
        targets = np.minimum(lengths, 20)
        write_half(Path(f"{prefix}_inputs_document"), lengths - targets, with_tokens=with_tokens)
        write_half(Path(f"{prefix}_targets_document"), targets, with_tokens=with_tokens)
        prefixes.append(str(prefix))
    return prefixes


def apart(function: Any, *arguments: Any) -> dict[str, Any]:
    """Call a function in a fresh process; add the most memory that it had for itself at once."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_put, args=(results, function, arguments))
    process.start()
    peak, found = 0, None
    while found is None:
        peak = max(peak, own_memory_kib(process.pid))
        try:
            found = results.get(timeout=SAMPLE_SECONDS)
        except queue.Empty:
            if process.exitcode is not None:
                raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}") from None
    process.join()
    return {**found, "peak_own_memory_gib": round(peak / 2**20, 2)}


def _put(results: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    results.put(function(*arguments))


def own_memory_kib(pid: int | None) -> int:
    """Read RssAnon of a process, KiB: pages of files, which all processes share, are not in it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def build(prefixes: list[str], directory: str) -> dict[str, Any]:
    """Build the index of one pass over the datasets."""
    from megatron_xmtf.config.schema import DataConfig
    from megatron_xmtf.data.mixture import open_datasets
    from megatron_xmtf.data.packing import build_packing_index, index_path

    data = DataConfig.model_validate({"train": [{"prefix": prefix} for prefix in prefixes]})
    started = time.perf_counter()
    datasets = open_datasets(data.training_datasets)
    opened = time.perf_counter()
    rows_needed = sum(int((d.input_lengths + d.target_lengths).sum(dtype=np.int64)) for d in datasets)
    rows_needed //= SEQUENCE_LENGTH + 1
    index = build_packing_index(
        datasets, data=data, sequence_length=SEQUENCE_LENGTH, rows_needed=rows_needed, seed=0, directory=directory
    )
    done = time.perf_counter()
    path = index_path(directory, index.key)
    return {
        "open_seconds": round(opened - started, 2),
        "build_seconds": round(done - opened, 2),
        "rows": len(index),
        "segments": len(index.example_ids),
        "fill_fraction": round(index.statistics["fill_fraction"], 6),
        "index_gb": round(sum(file.stat().st_size for file in path.iterdir()) / 1e9, 3),
        "path": str(path),
    }


def open_as_rank(prefixes: list[str], path: str, verify: bool) -> dict[str, float]:
    """Open datasets and index as a training rank does, and read a row's segments."""
    from megatron_xmtf.config.schema import DatasetConfig
    from megatron_xmtf.data.mixture import open_datasets
    from megatron_xmtf.data.packing_index import PackingIndex
    from megatron_xmtf.data.rows import PackedRows

    before, started = own_memory_kib(os.getpid()), time.perf_counter()
    datasets = open_datasets([DatasetConfig(prefix=prefix) for prefix in prefixes])
    opened = time.perf_counter()
    rows = PackedRows(datasets, PackingIndex.load(path, verify=verify), pad_id=0)
    rows[len(rows) // 2]
    return {
        "datasets_seconds": round(opened - started, 3),
        "index_seconds": round(time.perf_counter() - opened, 3),
        "own_memory_mib": round((own_memory_kib(os.getpid()) - before) / 1024, 1),
    }


def open_in_ranks(prefixes: list[str], path: str, *, verify: bool, num_ranks: int) -> dict[str, float]:
    """Open in several fresh processes at once; the slowest and the largest count."""
    with multiprocessing.get_context("spawn").Pool(num_ranks) as pool:
        found = pool.starmap(open_as_rank, [(prefixes, path, verify)] * num_ranks, chunksize=1)
    return {name: max(rank[name] for rank in found) for name in found[0]}


def load_batches(prefixes: list[str]) -> dict[str, float]:
    """Read steps of a data-parallel size of 1, every row at another place of the files."""
    from megatron_xmtf.config.schema import DatasetConfig
    from megatron_xmtf.config.step_rows import StepRows
    from megatron_xmtf.data.loader import BatchLoader
    from megatron_xmtf.data.mixture import open_datasets
    from megatron_xmtf.data.packing import pack_mixture
    from megatron_xmtf.data.rows import PackedRows

    datasets = open_datasets([DatasetConfig(prefix=prefix) for prefix in prefixes])
    rows = PackedRows(datasets, pack_mixture(datasets, sequence_length=SEQUENCE_LENGTH), pad_id=0)
    loader = BatchLoader(
        rows,
        micro_batch_size=MICRO_BATCH_SIZE,
        step_rows=StepRows(GLOBAL_BATCH_SIZE),
        data_parallel_rank=0,
        data_parallel_size=1,
        normalization="target_sequence",
    )
    loader.micro_batches(0)
    started = time.perf_counter()
    for step in range(1, LOADER_STEPS + 1):
        loader.micro_batches(step)
    rows_per_second = LOADER_STEPS * GLOBAL_BATCH_SIZE / (time.perf_counter() - started)
    return {"rows_per_second": round(rows_per_second), "tokens_per_second": round(rows_per_second * SEQUENCE_LENGTH)}


def main() -> None:
    """Measure the three parts, print them, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=80_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="where the files are made and removed; by default temporary")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the results")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        small = directory / "small"
        small.mkdir()
        loader = apart(
            load_batches, write_datasets(small, LOADER_EXAMPLES, num_datasets=NUM_DATASETS, with_tokens=True)
        )
        print(f"loader   {loader}", flush=True)
        prefixes = write_datasets(directory, arguments.examples, num_datasets=NUM_DATASETS, with_tokens=False)
        built = apart(build, prefixes, str(directory / "packing"))
        path = built.pop("path")
        print(f"build    {built}", flush=True)
        ranks = {
            name: open_in_ranks(prefixes, path, verify=verify, num_ranks=arguments.ranks)
            for name, verify in (("each_verifies", True), ("mapped", False))
        }
        print(*(f"{arguments.ranks} ranks  {name:<14}{values}" for name, values in ranks.items()), sep="\n")
    report = {
        "benchmark": "packed_run",
        "date": date.today().isoformat(),
        "machine": arguments.machine,
        "versions": {"python": platform.python_version(), "numpy": importlib.metadata.version("numpy")},
        "examples": arguments.examples,
        "datasets": NUM_DATASETS,
        "num_ranks": arguments.ranks,
        "build": built,
        "ranks": ranks,
        "loader": loader,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
