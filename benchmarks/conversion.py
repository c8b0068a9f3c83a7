"""Converters beside a plain copy of the same bytes and beside `from_pretrained` + `save_pretrained`, in one run.

    python benchmarks/conversion.py --output benchmarks/results/conversion.json
    python benchmarks/conversion.py --slice-176b --output benchmarks/results/conversion_176b.json

The first converts a BLOOM of 1b7's width with 16 layers (bf16, 2.6 GB, three files), in turn, `--rounds` times; the
second two layers of BLOOM-176B and its embedding of 250,880 words (17 GB; 55 GB of free disk), without `transformers`,
which would need all of it in memory. Every side runs in a process of its own, on files that are out of the page cache,
and ends with its output flushed to the disk.

    copy            the files of weights through the system's cache, 8 MiB at a time, one after another, fsync
    streamed copy   the same with the conversions' own reads and writes, which do not stay in the cache
    import          `xmtf import --hf`, with --workers processes
    export          `xmtf export`, with twice as many where the model is large, as by default: they wait for the disk
    transformers    AutoModelForCausalLM.from_pretrained, save_pretrained, fsync

A virtual machine pays for the first touch of each page that its host has taken back, several seconds a GB: before each
side as much memory as it may want is touched and freed, so that none does (the copy through the cache gains most).

Memory is anonymous memory summed over the processes of a side (pages of mapped files belong to the page cache), sampled
every 50 ms, less that of the same command when it has imported what it needs and not begun.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 2048, "n_layer": 16, "n_head": 16, "vocab_size": 250_880}
SLICE = {"hidden_size": 14_336, "n_layer": 2, "n_head": 112, "vocab_size": 250_880}
WHOLE_176B_BYTES = 2 * 176_247_271_424
BLOCK, LARGE_BYTES = 64 << 20, 8 << 30
SAMPLE_SECONDS = 0.05

COPY = """
import os, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:3])
target.mkdir()
for path in sorted(source.glob("*.safetensors")):
    with open(path, "rb") as read, open(target / path.name, "wb") as write:
        while block := read.read(8 << 20):
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
"""
STREAMED_COPY = """
import os, sys
from pathlib import Path
from megatron_xmtf.streamed_io import BLOCK_BYTES, OnceReader, write_once
source, target = map(Path, sys.argv[1:3])
target.mkdir()
block = memoryview(bytearray(BLOCK_BYTES))
for path in sorted(source.glob("*.safetensors")):
    with open(path, "rb", buffering=0) as read, open(target / path.name, "wb", buffering=0) as write:
        place, reader = 0, OnceReader(read.fileno())
        while count := reader.read_into(block, place):
            write_once(write.fileno(), block[:count], place)
            place += count
        os.fsync(write.fileno())
"""
IMPORT = """
import sys
from megatron_xmtf.conversion.huggingface import import_huggingface
if len(sys.argv) > 2:
    import_huggingface(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
"""
EXPORT = """
import sys
from megatron_xmtf.conversion.huggingface_export import export_huggingface
if len(sys.argv) > 2:
    export_huggingface(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
"""
TRANSFORMERS = """
import os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, BloomForCausalLM
if len(sys.argv) > 2:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
    for path in Path(sys.argv[2]).iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
"""


def write_model(directory: Path, sizes: dict[str, int]) -> int:
    """Write a BLOOM of random bf16 weights as `save_pretrained` shards it, and its config; return its bytes."""
    import torch
    from transformers import BloomConfig

    from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
    from megatron_xmtf.conversion.mapping import expand_rows
    from megatron_xmtf.conversion.safetensors_file import SafetensorsFile, TensorHeader, plan_shards
    from megatron_xmtf.models.bloom_architecture import bloom_from_hf

    directory.mkdir(parents=True)
    config = BloomConfig(**sizes, dtype="bfloat16", architectures=["BloomForCausalLM"])
    config.save_pretrained(directory)
    mapping = bloom_mapping(bloom_from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8"))))
    headers = [
        TensorHeader(p.hf[0], p.source_shape, torch.bfloat16) for p in expand_rows(mapping, prefix=mapping.prefix)
    ]
    files = [
        SafetensorsFile(name, shard)
        for name, shard in plan_shards(headers, shard_bytes=1_000_000_000 if sizes is SMALL else 5_000_000_000).items()
    ]
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(BLOCK // 2, generator=generator)).to(torch.bfloat16)
    for file in files:
        file.create(directory)
        with open(directory / file.name, "r+b") as stream:
            for header in file.headers:
                columns = max(1, header.bytes // 2 // header.shape[0])
                rows = max(1, len(noise) // columns)
                for first in range(0, header.shape[0], rows):
                    count = min(rows, header.shape[0] - first)
                    part = noise[: count * columns].view(count, *header.shape[1:])
                    file.write_rows(stream.fileno(), header.name, part, first=first)
            os.fsync(stream.fileno())
    weight_map = {header.name: file.name for file in files for header in file.headers}
    total = sum(header.bytes for header in headers)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def anonymous_bytes(process_id: int) -> int:
    """Return the anonymous memory of a process and all below it, out of counters: maps would be walked under a lock."""
    total, pending = 0, [process_id]
    while pending:
        number = pending.pop()
        try:
            status = Path(f"/proc/{number}/status").read_text(encoding="utf-8")
            pending += map(int, Path(f"/proc/{number}/task/{number}/children").read_text(encoding="utf-8").split())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:"))
    return total


def run(program: str, *arguments: object) -> tuple[float, int]:
    """Run a side; return its seconds and the peak of its anonymous memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], env=environment)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.wait():
        raise SystemExit(f"a side failed with exit code {process.returncode}")
    return time.monotonic() - started, peak


def forget(directory: Path) -> None:
    """Take the files of a directory out of the page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def touch_memory(size: int) -> None:
    """Have the machine's free memory be its own, up to `size` bytes."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    program = f"import numpy; numpy.empty({min(size, free - (1 << 30))}, numpy.uint8).fill(1)"
    subprocess.run([sys.executable, "-c", program], check=True)


def measure(root: Path, total: int, *, rounds: int, workers: int, with_transformers: bool) -> dict[str, Any]:
    """Run all sides in turn."""
    model, checkpoint = root / "model", root / "checkpoint"
    exporting = workers if total < LARGE_BYTES else 2 * workers
    sides: dict[str, tuple[str, Path, Path, tuple[object, ...]]] = {
        "copy": (COPY, model, root / "copied", ()),
        "streamed copy": (STREAMED_COPY, model, root / "copied", ()),
        "import": (IMPORT, model, checkpoint, (workers,)),
        "export": (EXPORT, checkpoint, root / "exported", (exporting,)),
    }
    if with_transformers:
        sides["transformers"] = (TRANSFORMERS, model, root / "saved", ())
    # What the modules alone take, in one process; a worker process has imported them too.
    bare = {name: run(program) for name, (program, *_) in sides.items() if "copy" not in name}
    processes = {"import": 1 + (workers if workers > 1 else 0), "export": 1 + exporting}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    start: dict[str, list[float]] = {name: [] for name in bare}
    memory: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (program, source, target, more) in sides.items():
            if name in bare:
                start[name].append(run(program)[0])
            forget(source)
            touch_memory(2 * total + (1 << 30))
            took, peak = run(program, source, target, *more)
            seconds[name].append(took)
            started = bare[name][1] * processes.get(name, 1) if name in bare else 0
            memory[name].append((peak - started) / 2**30)
            if name != "import":
                shutil.rmtree(target)
        shutil.rmtree(checkpoint)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    begun = {name: statistics.median(values) for name, values in start.items()}
    working = {name: value - begun.get(name, 0) for name, value in median.items()}
    return {
        "bytes_of_weights": total,
        "rounds": rounds,
        "processes": {"import": workers, "export": exporting},
        "seconds": rounded(seconds),
        "seconds_to_start": rounded(start),
        "gb_per_second": {name: round(total / 1e9 / value, 3) for name, value in median.items()},
        "speed_over_copy": over(median, "copy"),
        "speed_over_streamed_copy": over(median, "streamed copy"),
        "speed_over_copy_once_started": over(working, "copy"),
        "speed_over_streamed_copy_once_started": over(working, "streamed copy"),
        "peak_anonymous_gib_over_import_baseline": {name: round(max(values), 3) for name, values in memory.items()},
        "baseline_gib_of_one_process": {name: round(value / 2**30, 3) for name, (_, value) in bare.items()},
    }


def rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Round for the result."""
    return {name: [round(value, 2) for value in values] for name, values in seconds.items()}


def over(seconds: dict[str, float], copy: str) -> dict[str, float]:
    """Return how many times as fast as a copy each other side is."""
    return {name: round(seconds[copy] / value, 3) for name, value in seconds.items() if name != copy}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice-176b", action="store_true", help="two layers and the embedding of BLOOM-176B")
    parser.add_argument("--rounds", type=int, default=None, help="default: 3, of the slice 1")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of a conversion")
    parser.add_argument("--directory", type=Path, help="where files are written; default: the system's temporary one")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    sizes = SLICE if arguments.slice_176b else SMALL
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        root = Path(name)
        needed, free = (55 if sizes is SLICE else 15) * 10**9, shutil.disk_usage(root).free
        if free < needed:
            raise SystemExit(f"{root} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; give --directory")
        total = write_model(root / "model", sizes)
        rounds = arguments.rounds or (1 if sizes is SLICE else 3)
        found = measure(root, total, rounds=rounds, workers=arguments.workers, with_transformers=sizes is SMALL)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "model": {**sizes, "dtype": "bfloat16"},
        **found,
    }
    if sizes is SLICE:
        result["extrapolated_to_176b"] = {
            "arithmetic": f"{WHOLE_176B_BYTES:,} bytes / the measured GB/s; memory does not grow with the model",
            "minutes": {
                side: round(WHOLE_176B_BYTES / 1e9 / found["gb_per_second"][side] / 60, 1)
                for side in ("copy", "streamed copy", "import", "export")
            },
        }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
