"""`xmtf pack`: build a run's packing index, or show how datasets pack."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from megatron_xmtf.config.row_lengths import RowLengths
    from megatron_xmtf.data.packing_index import PackingIndex, PackingStatistics

HELP = "pack examples into rows: build the index of a run, or show how datasets pack"

EXAMPLE = """\
  xmtf pack train.yaml
  xmtf pack train.yaml batch.sequence_length=1024
  xmtf pack --data data/sw data/yo --sequence-length 2048 --json
  xmtf pack --data data/sw data/yo --encoder-length 1024 --decoder-length 256
"""

POLICIES = ["drop", "truncate_inputs_left", "truncate_inputs_right", "error"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xmtf pack`."""
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG [key=value ...]", help="run configuration and overrides: build its index"
    )
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="indexed datasets to pack, without a configuration")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a row that the model reads")
    parser.add_argument(
        "--encoder-length", type=int, metavar="N", help="tokens of inputs in a row of an encoder-decoder, EOS included"
    )
    parser.add_argument("--decoder-length", type=int, metavar="N", help="tokens of targets in such a row")
    parser.add_argument("--seed", type=int, default=None, help="seed of the row order, with --data (default 42)")
    parser.add_argument(
        "--long-examples", choices=POLICIES, default=None, help="what happens to examples longer than a row (drop)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Build or show a packing index."""
    if bool(arguments.config) == bool(arguments.data):
        raise ConfigError("give a run configuration (xmtf pack train.yaml) or --data PREFIX..., and not both.")
    report = _pack_run(arguments) if arguments.config else _pack_data(arguments)
    if arguments.json:
        import json

        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        print(_word_report(report))
    return int(ExitCode.DONE)


def _pack_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the index that training with this configuration reads."""
    from megatron_xmtf.checkpoint.model_tokenizer import objective_tokenizer
    from megatron_xmtf.config import load_config
    from megatron_xmtf.data.mixture import open_datasets
    from megatron_xmtf.data.packing import build_packing_index, index_directory, index_path, pack_dataset
    from megatron_xmtf.evaluation.guarding import drop_flagged

    for option in ("sequence_length", "encoder_length", "decoder_length", "seed", "long_examples"):
        if getattr(arguments, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} goes with --data; for a configuration give batch.sequence_length=N, "
                "batch.encoder_length=N, batch.decoder_length=N, "
                "seed=N or data.long_examples=POLICY."
            )
    path, *overrides = arguments.config
    config = load_config(path, overrides)
    directory = index_directory(config)
    tokenizer = objective_tokenizer(config)
    datasets = open_datasets(config.data.training_datasets, batch=config.batch, tokenizer=tokenizer)
    index = build_packing_index(
        datasets,
        data=config.data,
        sequence_length=config.batch.row_lengths,
        rows_needed=config.train_rows,
        seed=config.seed,
        directory=directory,
        guards=drop_flagged(config, datasets),
    )
    entries = config.data.validation_datasets
    validation = [
        pack_dataset(
            dataset,
            entry=entry,
            split_seed=config.data.split_seed,
            sequence_length=config.batch.row_lengths,
            long_examples=config.data.long_examples,
        ).statistics
        for entry, dataset in zip(entries, open_datasets(entries, batch=config.batch, tokenizer=tokenizer), strict=True)
    ]
    return {**_describe(index), "index": str(index_path(directory, index.key)), "validation": validation}


def _pack_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pack one epoch of datasets in memory."""
    from megatron_xmtf.config import DatasetConfig
    from megatron_xmtf.data.mixture import open_datasets
    from megatron_xmtf.data.packing import pack_mixture

    row_lengths = _row_lengths(arguments)
    seed = 42 if arguments.seed is None else arguments.seed
    if seed < 0:
        raise ConfigError(f"--seed {seed} is negative; seeds count from 0.")
    index = pack_mixture(
        open_datasets([DatasetConfig(prefix=prefix) for prefix in arguments.data]),
        sequence_length=row_lengths,
        long_examples=arguments.long_examples or "drop",
        seed=seed,
    )
    return _describe(index)


def _row_lengths(arguments: argparse.Namespace) -> RowLengths:
    from megatron_xmtf.config.row_lengths import EncoderDecoderLengths

    sides = arguments.encoder_length, arguments.decoder_length
    if sides != (None, None):
        if arguments.sequence_length is not None or not all(side is not None and side >= 2 for side in sides):
            raise ConfigError(
                f"rows of an encoder-decoder need --encoder-length and --decoder-length, both at least 2, and no "
                f"--sequence-length; given are {sides[0]}, {sides[1]} and {arguments.sequence_length}."
            )
        return EncoderDecoderLengths(*sides)
    if arguments.sequence_length is None or arguments.sequence_length < 1:
        given = "it is missing" if arguments.sequence_length is None else f"it is {arguments.sequence_length}"
        raise ConfigError(f"--data needs --sequence-length N, tokens of a row, at least 1; {given}.")
    return int(arguments.sequence_length)


def _describe(index: PackingIndex) -> dict[str, Any]:
    return {
        "sequence_length": index.sequence_length,
        "capacity": index.capacity,
        **({} if isinstance(index.row_lengths, int) else asdict(index.row_lengths)),
        "long_examples": index.long_examples,
        "key": index.key,
        **index.statistics,
    }


def _word_report(report: dict[str, Any]) -> str:
    """Word a report for a person: totals, then a line for each dataset."""
    lines = [f"{'index':<16}{report['index']}"] if "index" in report else []
    for name in ("rows", "examples", "repeats", "epochs", "tokens", "target_tokens", "dropped", "truncated", "empty"):
        lines.append(f"{name:<16}{report[name]:,}")
    lines.append(f"{'fill_fraction':<16}{report['fill_fraction']:.5f}  of rows of {report['capacity']:,} tokens")
    for name in ("encoder_fill_fraction", "decoder_fill_fraction"):
        if name in report:
            lines.append(f"{name:<24}{report[name]:.5f}  of {report[name.replace('fill_fraction', 'length')]:,} tokens")
    if "fewest_rows" in report:
        lines.append(f"{'fewest_rows':<16}{report['fewest_rows']:,}  no packing of these examples has fewer")
    lines += ["", *_word_table(report["datasets"])]
    for statistics in report.get("validation", []):
        lines += ["", _word_validation(statistics), *_word_table(statistics["datasets"])]
    return "\n".join(lines)


def _word_validation(statistics: PackingStatistics) -> str:
    return f"validation: {statistics['rows']:,} rows, fill_fraction {statistics['fill_fraction']:.5f}"


def _word_table(datasets: list[Any]) -> list[str]:
    columns = ["examples", "repeats", "epochs", "tokens", "target_tokens", "dropped", "truncated", "empty"]
    width = max(len("dataset"), *(len(dataset["name"]) for dataset in datasets)) + 2
    lines = [f"{'dataset':<{width}}" + "".join(f"{column:>15}" for column in columns)]
    for dataset in datasets:
        cells = [f"{dataset[column]:,.2f}" if column == "epochs" else f"{dataset[column]:,}" for column in columns]
        lines.append(f"{dataset['name']:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
    return lines
