"""`xmtf inspect`: what is this dataset, packing index or checkpoint, and is it whole and unaltered?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.tokenizer import Tokenizer

HELP = "say what a dataset, packing index or checkpoint is, and whether it is whole"

EXAMPLE = """\
  xmtf inspect data/train --show 2 --tokenizer models/bloom-560m
  xmtf inspect data/train --deep
  xmtf inspect runs/first --json
"""

SHOWN_IDS = 24
"""Token ids printed of a half; --json has all of them."""
NAMES_SHOWN = 12
"""Names printed of a column, the most frequent first; --json has all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xmtf inspect`."""
    parser.add_argument(
        "path", metavar="PATH", help="prefix of a dataset, directory of a checkpoint, run or packing index"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N examples of a dataset")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="with --show: begin at example I")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="decode what is shown; also checks that the data was made with it"
    )
    parser.add_argument("--deep", action="store_true", help="read everything: compare each SHA-256 and every token id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Find out what it is, verify it, describe it."""
    path = Path(arguments.path)
    if arguments.show < 0 or arguments.start < 0:
        raise ConfigError(f"--show {arguments.show} --start {arguments.start}: neither can be negative.")
    if (path / "packing.json").is_file():
        report, text = _packing(path)
    elif path.is_dir() and (prefixes := _prefixes_in(path)):
        raise ConfigError(f"{path} is a directory of datasets; give the prefix of one: {', '.join(prefixes[:10])}.")
    elif path.is_dir():
        report, text = _checkpoint(path, deep=arguments.deep)
    else:
        report, text = _dataset(path, arguments)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else text)
    return int(ExitCode.DONE)


def _packing(path: Path) -> tuple[dict[str, Any], str]:
    from megatron_xmtf.data.packing_index import PackingIndex

    index = PackingIndex.load(path)
    statistics = index.statistics
    report = {
        "type": "packing index",
        "path": str(path),
        "sequence_length": index.sequence_length,
        "long_examples": index.long_examples,
        "key": index.key,
        "statistics": statistics,
        "unaltered": True,
    }
    lines = [
        f"{path}: packing index, {statistics['rows']:,} rows of {index.sequence_length:,} tokens, "
        f"{100 * statistics['fill_fraction']:.2f} % filled",
        f"examples   {statistics['examples']:,} in {statistics['epochs']} epochs; {statistics['dropped']:,} dropped, "
        f"{statistics['truncated']:,} truncated, {statistics['empty']:,} without target ({index.long_examples})",
        *(f"  {entry['name']}  {entry['examples']:,} examples" for entry in statistics["datasets"]),
        "whole and unaltered: every SHA-256 is that of packing.json",
    ]
    return report, "\n".join(lines)


def _checkpoint(path: Path, *, deep: bool) -> tuple[dict[str, Any], str]:
    from dataclasses import asdict

    from megatron_xmtf.checkpoint.directory import find_checkpoint
    from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
    from megatron_xmtf.checkpoint.safe_read import read_metadata

    directory = find_checkpoint(path)
    manifest = open_manifest(directory)
    if deep:
        verify_hashes(directory, manifest)
        read_metadata(directory)  # hashes prove a file whole; reading the pickle, that it is harmless
    report = {"type": "checkpoint", "path": str(directory), "unaltered": True if deep else None, **asdict(manifest)}
    shape = ", ".join(f"{name} {value}" for name, value in manifest.architecture.items())
    lines = [
        f"{directory}: checkpoint of step {manifest.step:,}, {', '.join(manifest.contents)}, weights {manifest.dtype}",
        f"model      {shape}",
        f"data       {manifest.consumed_rows:,} rows consumed",
        f"versions   {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
        f"files      {len(manifest.files)}, {manifest.total_bytes / 2**20:,.1f} MiB",
        _verdict(deep, known=True),
    ]
    return report, "\n".join(lines)


def _dataset(path: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megatron_xmtf.data.dataset_manifest import length_statistics
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    dataset = ExampleDataset.open(_prefix(path), tokenizer=tokenizer, deep=arguments.deep)
    lengths = {half.split("_")[0]: length_statistics(file.lengths) for half, file in dataset.halves.items()}
    if dataset.kind == "pairs":
        lengths["examples"] = length_statistics(dataset.input_lengths + dataset.target_lengths)
    if arguments.start >= len(dataset):
        raise ConfigError(f"--start {arguments.start}: {dataset.prefix} has {len(dataset)} examples, counted from 0.")
    last = min(arguments.start + arguments.show, len(dataset))
    report = {
        "type": "dataset",
        "path": str(dataset.prefix),
        "kind": dataset.kind,
        "num_examples": len(dataset),
        "dtype": next(iter(dataset.halves.values())).dtype.name,
        "tokens": {half.split("_")[0]: file.num_tokens for half, file in dataset.halves.items()},
        "lengths": lengths,
        "columns": {name: _column_counts(dataset, name) for name in dataset.column_names},
        "manifest": dataset.manifest,
        "unaltered": True if arguments.deep and dataset.manifest else None,
        "examples": [_example(dataset, index, tokenizer) for index in range(arguments.start, last)],
    }
    return report, _word_dataset(report, deep=arguments.deep)


def _prefix(path: Path) -> Path:
    """Take the name of one of a dataset's files for its prefix."""
    name = path.name
    for ending in (".json", ".idx", ".bin", ".npz", "_inputs_document", "_targets_document", "_text_document"):
        name = name.removesuffix(ending)
    return path.with_name(name.removesuffix("_columns") if path.suffix == ".npz" else name)


def _prefixes_in(directory: Path) -> list[str]:
    """Name the prefixes of the datasets whose files lie in a directory."""
    return sorted({str(_prefix(path)) for path in directory.glob("*_document.idx")})


def _column_counts(dataset: ExampleDataset, name: str) -> dict[str, int]:
    """Count the examples of each name, the most frequent first."""
    import numpy as np

    values, names = dataset.column(name), dataset.names(name)
    assert values is not None
    counts = np.bincount(values, minlength=len(names))
    return {names[index]: int(counts[index]) for index in np.argsort(-counts, kind="stable")}


def _example(dataset: ExampleDataset, index: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    inputs, targets = (half.tolist() for half in dataset[index])
    example: dict[str, Any] = {"index": index}
    for name in dataset.column_names:
        values = dataset.column(name)
        assert values is not None
        example[name] = dataset.names(name)[int(values[index])]
    halves = {"text": targets} if dataset.kind == "text" else {"inputs": inputs, "targets": targets}
    for name, ids in halves.items():
        example[f"{name}_ids"] = ids
        if tokenizer is not None:
            example[f"{name}_text"] = tokenizer.decode(ids)
    return example


def _word_dataset(report: dict[str, Any], *, deep: bool) -> str:
    from megatron_xmtf.cli.preprocess import length_table

    manifest = report["manifest"]
    lines = [f"{report['path']}: {report['num_examples']:,} examples of kind {report['kind']} ({report['dtype']})"]
    tokenizer = manifest["tokenizer"] if manifest else None
    if tokenizer is None:
        lines.append("tokenizer  unknown: there is no manifest that names it")
    else:
        prefix = manifest.get("target_prefix")
        lines.append(
            f"tokenizer  {tokenizer['fingerprint'][:12]}..., {tokenizer['vocab_size']:,} ids, "
            f"end of sequence {tokenizer['eos_id']}" + (f", targets begin with {prefix!r}" if prefix else "")
        )
    if manifest and "counts" in manifest:
        counts = {name: count for name, count in manifest["counts"].items() if isinstance(count, int)}
        lines.append("records    " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    lines.append(length_table(report))
    for name, counts in report["columns"].items():
        shown = ", ".join(f"{value or '(none)'} {count:,}" for value, count in list(counts.items())[:NAMES_SHOWN])
        more = f", and {len(counts) - NAMES_SHOWN:,} more" if len(counts) > NAMES_SHOWN else ""
        lines.append(f"{name:<11}{shown}{more}")
    lines.append(_verdict(deep, known=manifest is not None))
    lines += [_word_example(example) for example in report["examples"]]
    return "\n".join(lines)


def _word_example(example: dict[str, Any]) -> str:
    """Show one example; text is quoted, so that white space and line ends are seen."""
    about = [f"{name} {value}" for name, value in example.items() if isinstance(value, str) and "_" not in name]
    lines = [f"\nexample {example['index']}" + (f"  ({', '.join(about)})" if about else "")]
    for name in ("inputs", "targets", "text"):
        ids = example.get(f"{name}_ids")
        if ids is None:
            continue
        cut = f" ... {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
        lines.append(f"  {name:<8}{' '.join(map(str, ids[:SHOWN_IDS]))}{cut}")
        if f"{name}_text" in example:
            lines.append(f"  {'':<8}{json.dumps(example[f'{name}_text'], ensure_ascii=False)}")
    return "\n".join(lines)


def _verdict(deep: bool, *, known: bool) -> str:
    if not known:
        return "whole: the files agree with one another; without a manifest nothing tells whether they were altered"
    if deep:
        return "whole and unaltered: every SHA-256 is that of the manifest"
    return "whole: every file has the size of the manifest (--deep compares the contents too)"
