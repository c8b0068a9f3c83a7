"""Tokenise prompted data beside Megatron-LM's tools/preprocess_data.py, in one run, and compare every id.

    python benchmarks/preprocess.py --data DIR --megatron MEGATRON_LM_CHECKOUT --work DIR --megabytes 200 \\
        --output benchmarks/results/preprocess.json

    ours          xmtf preprocess --workers 2, the whole command: start, tokenise, hash, write, commit
    megatron      tools/preprocess_data.py --workers 2 of the checkout, the whole command
    encode_batch  no tool: lines read as JSON, then tokenizers' encode_batch_fast on 2 threads; nothing is written
    gigatoken     the same with gigatoken's encode_batch_list, where --gigatoken names a Python that has it

DIR holds the real data and the tokenizers; records are rendered from them once, with several templates a row, into
--work. Three sets of them: in the order of `xmtf render`, each distinct pair of inputs and targets once in that order,
and in a random order, the worst one for remembering segments. Ratio: peer's seconds / ours.

Megatron-LM adds no target prefix and no EOS of targets alone, so its records have the prefix written out, and our EOS
is taken off before ids are compared; it indexes the last of its keys only, so the inputs' ids are compared as one
sequence.

The checkout: `git archive core_v0.16.0`; it also wants `six` and `triton`: pip install --target MEGATRON_LM_CHECKOUT
--no-deps six triton.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rendered_records import RecordSet, write_records

from megatron_xmtf.data.indexed_dataset import IndexedDataset
from megatron_xmtf.files import write_json

Seconds = float
WORKERS = 2
REPOSITORY = Path(__file__).parents[1]
ENCODE_BATCH = """
import json, sys
from tokenizers import Tokenizer
tokenizer, prefix = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json"), sys.argv[3]
tokens, texts = 0, []
def encode():
    global tokens, texts
    tokens += sum(len(one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    texts = []
for line in open(sys.argv[2], "rb"):
    row = json.loads(line)
    texts += [row["inputs"], prefix + row["targets"]]
    if len(texts) >= 20000:
        encode()
encode()
print(tokens)
"""
GIGATOKEN = """
import json, sys
import gigatoken
tokenizer, prefix = gigatoken.Tokenizer(sys.argv[1]), sys.argv[3]
tokens, texts = 0, []
def encode():
    global tokens, texts
    tokens += sum(map(len, tokenizer.encode_batch_list(texts)))
    texts = []
for line in open(sys.argv[2], "rb"):
    row = json.loads(line)
    texts += [row["inputs"], prefix + row["targets"]]
    if len(texts) >= 20000:
        encode()
encode()
print(tokens)
"""


def run_ours(records: Path, *, tokenizer: Path, prefix: Path) -> Seconds:
    """Run `xmtf preprocess` as a user does."""
    command = ["preprocess", "--input", records, "--tokenizer", tokenizer, "--output-prefix", prefix]
    return _timed(
        [sys.executable, "-m", "megatron_xmtf", *command, "--workers", WORKERS, "--overwrite"],
        environment={"PYTHONPATH": str(REPOSITORY)},
    )[0]


def run_megatron(records: Path, *, checkout: Path, tokenizer: Path, prefix: Path) -> Seconds:
    """Run Megatron-LM's tool with its Hugging Face tokenizer, the fast kind."""
    command: list[Any] = [sys.executable, checkout / "tools" / "preprocess_data.py", "--input", records]
    command += ["--json-keys", "inputs", "targets", "--output-prefix", prefix, "--workers", WORKERS]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--tokenizer-hf-use-fast"]
    return _timed([*command, "--log-interval", 100_000], environment={"PYTHONPATH": str(checkout)})[0]


def run_bare(program: str, records: Path, *, python: str, tokenizer: Path) -> tuple[Seconds, int]:
    """Run a program that only reads and tokenises; return seconds and tokens."""
    environment = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(WORKERS)}
    seconds, output = _timed([python, "-c", program, tokenizer, records, " "], environment=environment)
    return seconds, int(output.split()[-1])


def _timed(command: list[Any], *, environment: dict[str, str]) -> tuple[Seconds, str]:
    started = time.monotonic()
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - started, done.stdout


def compare_ids(ours: Path, megatron: Path) -> int:
    """Return the number of tokens compared; SystemExit where an id or a length differs."""
    dtype = np.dtype(json.loads(ours.with_name(f"{ours.name}.json").read_text(encoding="utf-8"))["dtype"])
    compared = 0
    for half, without_eos in (("inputs", False), ("targets", True)):
        prefix = ours.with_name(f"{ours.name}_{half}_document")
        lengths = IndexedDataset(prefix).lengths.astype(np.int64)
        tokens = np.fromfile(f"{prefix}.bin", dtype)
        if without_eos:
            tokens = np.delete(tokens, np.cumsum(lengths) - 1)
            theirs = IndexedDataset(megatron.with_name(f"{megatron.name}_{half}_document"))
            if not np.array_equal(theirs.lengths, lengths - 1):
                raise SystemExit(f"the lengths of {half} differ")
        if not np.array_equal(tokens, np.fromfile(f"{megatron}_{half}_document.bin", dtype)):
            raise SystemExit(f"the ids of {half} differ")
        compared += len(tokens)
    return compared


def repeated_text(records: Path) -> dict[str, float]:
    """Return how much of the text is in words that came before, and how many records came before, in percent."""
    words: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    characters = repeated = count = 0
    with open(records, "rb") as stream:
        for line in stream:
            row = json.loads(line)
            pairs.add((row["inputs"], row["targets"]))
            count += 1
            parts = [*row["inputs"].split(" "), *row["targets"].split(" ")]
            characters += sum(map(len, parts))
            repeated += sum(len(part) for part in parts if part in words)
            words.update(parts)
    return {
        "repeated_words_percent": round(100 * repeated / characters, 2),
        "repeated_records_percent": round(100 * (1 - len(pairs) / count), 2),
        "records": count,
    }


def measure(name: RecordSet, ours: Path, megatron: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all sides over one set of records."""
    work, tokenizer = arguments.work, arguments.tokenizer
    result: dict[str, Any] = {"set": name, "megabytes": round(ours.stat().st_size / 1e6, 1), **repeated_text(ours)}
    count = result["records"]
    seconds = {"ours": run_ours(ours, tokenizer=tokenizer, prefix=work / "ours")}
    seconds["megatron"] = run_megatron(
        megatron, checkout=arguments.megatron, tokenizer=tokenizer, prefix=work / "megatron"
    )
    result["tokens_compared"] = compared = compare_ids(work / "ours", work / "megatron")
    peers = {"encode_batch": (ENCODE_BATCH, sys.executable)}
    if arguments.gigatoken:
        peers["gigatoken"] = (GIGATOKEN, arguments.gigatoken)
    for peer, (program, python) in peers.items():
        seconds[peer], tokens = run_bare(program, ours, python=python, tokenizer=tokenizer)
        if tokens != compared:
            print(f"{peer} makes {tokens:,} tokens, not {compared:,}: it is not exact here")
        result[f"{peer}_tokens"] = tokens
    for side, value in seconds.items():
        result[side] = {
            "seconds": round(value, 2),
            "records_per_second": round(count / value),
            "megabytes_per_second": round(result["megabytes"] / value, 2),
            "ratio": round(value / seconds["ours"], 2),
        }
    _print(result, list(seconds))
    return result


def _print(result: dict[str, Any], names: list[str]) -> None:
    repeated = f"{result['repeated_records_percent']} % of them and {result['repeated_words_percent']} % of their text"
    print(f"\n{result['set']}: {result['megabytes']:.0f} MB, {result['records']:,} records; repeated: {repeated}")
    print(f"{result['tokens_compared']:,} ids equal")
    print(f"{'':<14}{'seconds':>9}{'records/s':>12}{'MB/s':>8}{'ratio':>8}")
    for name in names:
        row = result[name]
        cells = f"{row['seconds']:>9.1f}{row['records_per_second']:>12,}{row['megabytes_per_second']:>8.1f}"
        print(f"{name:<14}{cells}{row['ratio']:>8.2f}")


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the real data")
    parser.add_argument("--megatron", type=Path, required=True, help="a Megatron-LM checkout")
    parser.add_argument("--work", type=Path, required=True, help="for records and datasets; records are kept")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--tokenizer", type=Path, help="default: Whisper's, of the real data")
    parser.add_argument("--gigatoken", help="a Python that has gigatoken")
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core CPU", help="as it is to stand in the results")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.tokenizer = arguments.tokenizer or arguments.data / "tokenizers" / "whisper-large-v3"
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = write_records(arguments.work, data=arguments.data, megabytes=arguments.megabytes)
    results = [measure(name, *pair, arguments) for name, pair in files.items()]
    if arguments.output:
        content = {
            "benchmark": "preprocess",
            "date": date.today().isoformat(),
            "machine": arguments.machine,
            "versions": {
                "python": platform.python_version(),
                **{
                    name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "orjson", "numpy")
                },
                "Megatron-LM": "core_v0.16.0",
            },
            "tokenizer": arguments.tokenizer.name,
            "workers": WORKERS,
            "results": results,
        }
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
