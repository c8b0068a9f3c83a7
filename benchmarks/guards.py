"""Measure the guards: examples per second of one core by guard, memory, growth, beside datasketch's MinHash LSH.

    python benchmarks/guards.py --data ../shared/data                              records rendered from real data
    python benchmarks/guards.py --data ../shared/data --scale 1000000 10000000     those, varied, many times over
    python benchmarks/guards.py --data ../shared/data --datasketch-python PYTHON   a Python that has datasketch

Every measurement is a process of its own and includes its start-up inside `scan`, not the interpreter's. The evaluation
texts are MGSM (5 languages), SIB-200 test (8) and XCOPA validation (6). Examples are counted once, however many guards
look at them.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER = "tokenizers/whisper-large-v3"
GUARDS = {
    "duplicates": {"contamination": "off"},
    "contamination": {"duplicates": "off"},
    "near duplicates": {"duplicates": "off", "near_duplicates": "report", "contamination": "off"},
    "all": {"near_duplicates": "report"},
}
"""What is measured -> settings that differ from the defaults."""
PEER_TEXTS = 20_000
"""Texts given to datasketch and to ours beside it."""
BLOCK = 100_000


def evaluation_texts(data: Path) -> list[Any]:
    """Word the evaluation sets plainly."""
    from megatron_xmtf.data.guards import EvaluationText

    texts = []
    for language in ("en", "es", "fr", "sw", "zh"):
        for line in (data / "mgsm" / f"mgsm_{language}.tsv").read_text(encoding="utf-8").splitlines():
            question, answer = line.split("\t")
            texts.append(EvaluationText("mgsm", language, f"Question: {question}\nAnswer:", answer, "q"))
    for directory in sorted((data / "sib200").iterdir())[2:10]:
        with open(directory / "test.tsv", encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t"):
                inputs = f"What is the topic of this text? {row['text']}"
                texts.append(EvaluationText("sib200", directory.name, inputs, row["category"], "t"))
    for language in ("et", "id", "sw", "th", "tr", "zh"):
        path = data / "xcopa" / "data" / language / f"val.{language}.jsonl"
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            inputs = f"{row['premise']} What was the {row['question']}?\n- {row['choice1']}\n- {row['choice2']}"
            texts.append(EvaluationText("xcopa", language, inputs, row[f"choice{row['label'] + 1}"], "t"))
    return texts


def build_real(data: Path, directory: Path, megabytes: int) -> Path:
    """Render and tokenise real records; return the prefix of the dataset."""
    from rendered_records import write_records

    from megatron_xmtf.data.preprocess import preprocess

    prefix = directory / f"real-{megabytes}"
    if not prefix.with_name(prefix.name + ".json").exists():
        records, _ = write_records(directory, data=data, megabytes=megabytes, distinct=True)
        preprocess([records], tokenizer=data / TOKENIZER, output_prefix=prefix, workers=2, show_progress=False)
    return prefix


def build_scaled(real: Path, directory: Path, count: int) -> Path:
    """Repeat a dataset up to `count` examples, half of the input tokens elsewhere; without manifest or columns."""
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.indexed_writer import IndexedDatasetWriter

    prefix = directory / f"scaled-{count}"
    source, generator = ExampleDataset.open(real), np.random.default_rng(0)
    for half, file in source.halves.items():
        path = prefix.with_name(f"{prefix.name}_{half}")
        if path.with_name(path.name + ".idx").exists():
            continue
        with IndexedDatasetWriter(path, dtype=file.dtype) as writer:
            block = min(BLOCK, len(file))
            for start in range(0, count, block):
                some = min(block, count - start)
                first = start % max(len(file) - some, 1)
                low, high = file.token_range(first, min(first + some, len(file)))
                lengths, tokens = file.lengths[first : first + some], np.array(file.tokens[low:high])
                if half.startswith("inputs"):
                    places = generator.integers(0, len(tokens), len(tokens) // 2)
                    tokens[places] = tokens[generator.permutation(places)]
                writer.add(tokens, lengths)
    return prefix


class MemoryPeak:
    """Samples this process's own memory (not the mapped pages of dataset files, which are the system's to drop)."""

    def __init__(self) -> None:
        self.before = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) // 1024
        raise KeyError("RssAnon")

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    def stop(self) -> None:
        """End the sampling."""
        self._stop.set()
        self._thread.join()


def measure_scan(data: Path, prefix: Path, guard: str, workers: int) -> dict[str, Any]:
    """Run one scan in this process; memory is that of this process, and the largest of any one worker."""
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.guards import GuardSettings, scan
    from megatron_xmtf.data.tokenizer import Tokenizer

    dataset, tokenizer, texts = ExampleDataset.open(prefix), Tokenizer.load(data / TOKENIZER), evaluation_texts(data)
    memory = MemoryPeak()
    with tempfile.TemporaryDirectory(dir=prefix.parent) as directory:
        started = time.perf_counter()
        found = scan(
            [dataset],
            tokenizer=tokenizer,
            evaluation_texts=texts,
            settings=GuardSettings(**GUARDS[guard]),  # type: ignore[arg-type]
            directory=directory,
            workers=workers,
            show_progress=False,
        )
        seconds = time.perf_counter() - started
    memory.stop()
    row = found.report["datasets"][0]
    return {
        "examples": len(dataset),
        "tokens": int(dataset.input_lengths.sum(dtype=np.int64) + dataset.target_lengths.sum(dtype=np.int64)),
        "seconds": round(seconds, 2),
        "examples_per_second_per_core": round(len(dataset) / seconds / workers),
        "memory_before_mib": memory.before,
        "memory_peak_mib": memory.peak,
        "worker_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024 if workers > 1 else 0,
        **{name: row[name] for name in ("duplicates", "near_duplicates", "contamination")},
        "comparisons_left_out": found.report["near_duplicate_comparisons_left_out"],
    }


def measure_datasketch(path: Path) -> dict[str, Any]:
    """MinHash (70 permutations) and LSH of datasketch over shingles of 3 words; candidates are not verified."""
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

    texts = json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    lsh, flagged = MinHashLSH(params=(14, 5), num_perm=70), 0
    for number, text in enumerate(texts):
        words = text.lower().split()
        sketch = MinHash(num_perm=70)
        sketch.update_batch([" ".join(words[at : at + 3]).encode() for at in range(max(len(words) - 2, 1))])
        flagged += bool(lsh.query(sketch))
        lsh.insert(str(number), sketch)
    seconds = time.perf_counter() - started
    return {"texts": len(texts), "seconds": round(seconds, 2), "texts_per_second": round(len(texts) / seconds)}


def measure_ours(path: Path) -> dict[str, Any]:
    """The same work of ours on the same texts: units, shingles, bands, buckets; candidates are not verified."""
    from megatron_xmtf.data.guards.near_duplicates import find_near_duplicates, near_duplicate_bands
    from megatron_xmtf.data.guards.text_units import split_units

    texts = json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    parts, nothing = [], np.empty(0, np.uint64)
    for start in range(0, len(texts), 500):
        some = texts[start : start + 500]
        units = split_units([part for text in some for part in (text, "")])
        parts.append(near_duplicate_bands(units, np.zeros(len(some), np.int32), nothing))
    bands = np.concatenate(parts, axis=1)
    find_near_duplicates(bands, np.zeros(len(texts), np.bool_), verify=lambda pairs: np.ones(len(pairs), np.bool_))
    seconds = time.perf_counter() - started
    return {"texts": len(texts), "seconds": round(seconds, 2), "texts_per_second": round(len(texts) / seconds)}


def apart(python: str, *words: str) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    output = subprocess.run([python, __file__, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def compare_minhash(real: Path, data: Path, python: str) -> dict[str, Any]:
    """Measure MinHash and LSH of both on texts of the real dataset."""
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.tokenizer import Tokenizer

    dataset, tokenizer = ExampleDataset.open(real), Tokenizer.load(data / TOKENIZER)
    count = min(PEER_TEXTS, len(dataset))
    path = real.with_name("peer_texts.json")
    path.write_text(json.dumps([tokenizer.decode(dataset[n][0].tolist()) for n in range(count)]), encoding="utf-8")
    result = {
        "ours": apart(sys.executable, "--measure", "ours", str(path)),
        "datasketch": apart(python, "--measure", "datasketch", str(path)),
    }
    result["seconds_ratio"] = round(result["datasketch"]["seconds"] / result["ours"]["seconds"], 1)
    return result


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the shared real data")
    parser.add_argument("--megabytes", type=int, default=50, help="of records rendered from them")
    parser.add_argument("--scale", type=int, nargs="*", default=[], help="numbers of examples, for growth")
    parser.add_argument("--guards", nargs="*", default=list(GUARDS), choices=list(GUARDS), help="on the real records")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, help="directory that keeps the datasets; by default a temporary one")
    parser.add_argument("--datasketch-python", help="a Python that has datasketch; without it, it is not measured")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the results")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Measure and print everything but the peer."""
    data = arguments.data.resolve()
    prefix = build_real(data, work, arguments.megabytes)
    cases: list[tuple[str, Path, str, int]] = [("real", prefix, guard, 1) for guard in arguments.guards]
    cases += [("real", prefix, "all", workers) for workers in arguments.workers if workers > 1 and arguments.guards]
    for count in arguments.scale:
        cases.append(("scaled", build_scaled(prefix, work, count), "all", max(arguments.workers)))
    results = []
    for kind, path, guard, workers in cases:
        measured = apart(sys.executable, "--measure", "scan", str(data), str(path), guard, str(workers))
        results.append({"data": kind, "guard": guard, "workers": workers, **measured})
        print(json.dumps(results[-1]), flush=True)
    if arguments.datasketch_python:
        results.append(
            {"data": "real", "guard": "MinHash", **compare_minhash(prefix, data, arguments.datasketch_python)}
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Measure, print, write JSON where asked."""
    arguments = parse()
    if arguments.measure:
        measures: dict[str, Callable[..., dict[str, Any]]] = {"datasketch": measure_datasketch, "ours": measure_ours}
        kind, *words = arguments.measure
        if kind == "scan":
            print(json.dumps(measure_scan(Path(words[0]), Path(words[1]), words[2], int(words[3]))))
        else:
            print(json.dumps(measures[kind](Path(words[0]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = run(arguments, work)
    report = {
        "benchmark": "guards",
        "date": date.today().isoformat(),
        "machine": arguments.machine,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("numpy", "tokenizers")},
        "results": results,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
