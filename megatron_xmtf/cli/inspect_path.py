"""`xmtf inspect`: what is this dataset, packing index or checkpoint, and is it whole and unaltered?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.cli.inspect_rows import inspect_packing, inspect_run, load_tokenizer
from megatron_xmtf.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.tokenizer import Tokenizer

HELP = "say what a dataset, packing index or checkpoint is, and whether it is whole"

EXAMPLE = """\
  xmtf inspect data/train --show 2 --tokenizer models/bloom-560m
  xmtf inspect train.yaml --show 3 --row 1000
  xmtf inspect runs/first/packing/f5f8766c29e01133 --show 1 --data data/sw data/yo --tokenizer models/bloom-560m
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
        "path",
        metavar="PATH",
        help="prefix of a dataset, directory of a checkpoint, run or packing index, or a run's configuration: its rows",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with a configuration: overrides")
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N examples of a dataset or N rows of a packing index; tokens that bear loss are marked",
    )
    parser.add_argument("--start", type=int, default=0, metavar="I", help="with --show: begin at example I")
    parser.add_argument("--row", type=int, default=0, metavar="R", help="with --show: begin at row R")
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="datasets of a packing index, in its order")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="decode what is shown (with a configuration: by default its model's); also checks that it made the data",
    )
    parser.add_argument("--ids", action="store_true", help="with --show: print token ids too; --json always has them")
    parser.add_argument("--deep", action="store_true", help="read everything: compare each SHA-256 and every token id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Find out what it is, verify it, describe it."""
    path = Path(arguments.path)
    for name in ("show", "start", "row"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)} cannot be negative.")
    is_config = path.suffix in (".yaml", ".yml") and not path.is_dir()
    if arguments.overrides and not is_config:
        raise ConfigError(f"{' '.join(arguments.overrides)}: overrides go with a configuration, and {path} is none.")
    if is_config:
        report, text = inspect_run(path, arguments)
    elif (path / "packing.json").is_file():
        report, text = inspect_packing(path, arguments)
    elif path.is_dir() and (prefixes := _prefixes_in(path)):
        raise ConfigError(f"{path} is a directory of datasets; give the prefix of one: {', '.join(prefixes[:10])}.")
    elif path.is_dir():
        report, text = _checkpoint(path, deep=arguments.deep)
    else:
        report, text = _dataset(path, arguments)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else text)
    return int(ExitCode.DONE)


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
    from megatron_xmtf.report.marked_tokens import uses_colour

    tokenizer = load_tokenizer(arguments)
    dataset = ExampleDataset.open(_prefix(path), tokenizer=tokenizer, deep=arguments.deep)
    lengths = {half.split("_")[0]: length_statistics(file.lengths) for half, file in dataset.halves.items()}
    if dataset.kind == "pairs":
        lengths["examples"] = length_statistics(dataset.input_lengths + dataset.target_lengths)
    if arguments.start >= len(dataset):
        raise ConfigError(f"--start {arguments.start}: {dataset.prefix} has {len(dataset)} examples, counted from 0.")
    last = min(arguments.start + arguments.show, len(dataset))
    report: dict[str, Any] = {
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
    lines = [_word_dataset(report, deep=arguments.deep)]
    colour = uses_colour()
    lines += [_word_example(one, tokenizer, colour=colour, show_ids=arguments.ids) for one in report["examples"]]
    return report, "\n".join(lines)


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
    from megatron_xmtf.report.shown_rows import example_loss

    inputs, targets = (half.tolist() for half in dataset[index])
    example: dict[str, Any] = {"index": index}
    for name in dataset.column_names:
        values = dataset.column(name)
        assert values is not None
        example[name] = dataset.names(name)[int(values[index])]
    has_loss = example_loss(inputs, targets)
    halves = {"text": targets} if dataset.kind == "text" else {"inputs": inputs, "targets": targets}
    for name, ids in halves.items():
        example[f"{name}_ids"] = ids
        example[f"{name}_has_loss"] = has_loss[: len(ids)] if name == "inputs" else has_loss[len(inputs) :]
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
        lines.append(f"{name:<10} {shown}{more}")
    lines.append(_verdict(deep, known=manifest is not None))
    return "\n".join(lines)


def _word_example(example: dict[str, Any], tokenizer: Tokenizer | None, *, colour: bool, show_ids: bool) -> str:
    """Show one example, token by token, those that bear loss marked."""
    from megatron_xmtf.report.shown_rows import word_tokens

    about = [f"{name} {value}" for name, value in example.items() if isinstance(value, str) and name[-5:] != "_text"]
    lines = [f"\nexample {example['index']}" + (f"  ({', '.join(about)})" if about else "")]
    for name in ("inputs", "targets", "text"):
        ids = example.get(f"{name}_ids")
        if ids is None:
            continue
        if show_ids or tokenizer is None:
            cut = f" ... {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            lines.append(f"  {name:<8}{' '.join(map(str, ids[:SHOWN_IDS]))}{cut}")
        if tokenizer is not None:
            words = word_tokens(
                ids, example[f"{name}_has_loss"], num_inputs=0, tokenizer=tokenizer, colour=colour, indent=" " * 10
            )
            lines.append(f"  {'' if show_ids else name:<8}{words}")
    return "\n".join(lines)


def _verdict(deep: bool, *, known: bool) -> str:
    if not known:
        return "whole: the files agree with one another; without a manifest nothing tells whether they were altered"
    if deep:
        return "whole and unaltered: every SHA-256 is that of the manifest"
    return "whole: every file has the size of the manifest (--deep compares the contents too)"
