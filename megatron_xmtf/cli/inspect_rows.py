"""What `xmtf inspect` says of packing indexes, and the rows it shows of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import ConfigError

if TYPE_CHECKING:
    from megatron_xmtf.config import RunConfig
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.data.packing_index import PackingIndex, PackingStatistics
    from megatron_xmtf.data.tokenizer import Tokenizer

__all__ = ["inspect_packing", "inspect_run", "load_tokenizer"]


def inspect_run(path: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Show rows of a run: those that training reads, with its weights."""
    from megatron_xmtf.checkpoint.model_tokenizer import objective_tokenizer
    from megatron_xmtf.config import load_config
    from megatron_xmtf.data.mixture import open_datasets
    from megatron_xmtf.data.packing import index_directory, index_path, open_packing_index
    from megatron_xmtf.evaluation.guarding import drop_flagged

    config = load_config(path, arguments.overrides)
    tokenizer = load_tokenizer(arguments) if arguments.tokenizer else _model_tokenizer(config)
    datasets = open_datasets(
        config.data.training_datasets, batch=config.batch, tokenizer=tokenizer or objective_tokenizer(config)
    )
    index = open_packing_index(
        datasets,
        data=config.data,
        sequence_length=config.batch.row_lengths,
        rows_needed=config.train_rows,
        seed=config.seed,
        directory=index_directory(config),
        guards=drop_flagged(config, datasets, build=False),
    )
    report, text = _describe_packing(index_path(index_directory(config), index.key), index)
    return _with_rows(report, text, index, datasets, arguments, tokenizer=tokenizer, config=config)


def _model_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Load the tokenizer of a run's model, a Hugging Face directory or a checkpoint; None if it is not there yet."""
    from megatron_xmtf.checkpoint.model_tokenizer import load_model_tokenizer

    return load_model_tokenizer(config.tokenizer_source) if Path(config.tokenizer_source).is_dir() else None


def inspect_packing(path: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Describe an index and, with its datasets, show rows."""
    from megatron_xmtf.data.packing_index import PackingIndex

    index = PackingIndex.load(path)
    report, text = _describe_packing(path, index)
    if not arguments.data:
        if arguments.show:
            names = [entry["name"] for entry in index.statistics["datasets"]]
            raise ConfigError(
                f"an index holds no tokens: --show needs --data with the prefixes of its {len(names)} datasets, in its "
                f"order ({', '.join(names[:10])}); or give the run's configuration instead of {path}."
            )
        return report, text
    tokenizer = load_tokenizer(arguments)
    datasets = _open_indexed(index, arguments.data, tokenizer)
    return _with_rows(report, text, index, datasets, arguments, tokenizer=tokenizer, config=None)


def _open_indexed(index: PackingIndex, prefixes: list[str], tokenizer: Tokenizer | None) -> list[ExampleDataset]:
    """Open the datasets of an index, checked against what it was built from."""
    from megatron_xmtf.data.example_dataset import ExampleDataset
    from megatron_xmtf.files import sha256_json

    known = index.key_inputs["datasets"]
    if len(prefixes) != len(known):
        names = ", ".join(entry["name"] for entry in known[:10])
        raise ConfigError(f"--data names {len(prefixes)} datasets, the index has {len(known)}: {names}.")
    objectives = [entry["name"] for entry in known if "objective" in entry]
    if objectives:
        raise ConfigError(
            f"the index reads documents under objectives ({', '.join(objectives[:10])}); show its rows with the run's "
            "configuration, which says what is made of them: xmtf inspect CONFIG --show N."
        )
    datasets = []
    for prefix, entry in zip(prefixes, known, strict=True):
        dataset = ExampleDataset.open(prefix, name=entry["name"], tokenizer=tokenizer)
        if dataset.manifest is not None and sha256_json(dataset.manifest) != entry["sha256"]:
            raise ConfigError(
                f"{prefix} is not the dataset {entry['name']!r} that the index was built from; give the prefixes in "
                f"its order ({', '.join(entry['name'] for entry in known[:10])}), or pack again."
            )
        datasets.append(dataset)
    return datasets


def _with_rows(
    report: dict[str, Any],
    text: str,
    index: PackingIndex,
    datasets: list[ExampleDataset],
    arguments: argparse.Namespace,
    *,
    tokenizer: Tokenizer | None,
    config: RunConfig | None,
) -> tuple[dict[str, Any], str]:
    """Add the rows that are to be shown."""
    from megatron_xmtf.config.step_rows import StepRows
    from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRows
    from megatron_xmtf.data.loader import AnyRows
    from megatron_xmtf.data.rows import PackedRows
    from megatron_xmtf.report.marked_tokens import uses_colour
    from megatron_xmtf.report.shown_rows import show_row, word_row

    if arguments.row >= len(index):
        raise ConfigError(f"--row {arguments.row}: the index has {len(index):,} rows, counted from 0.")
    pad_id = tokenizer.pad_id if tokenizer else 0
    rows: AnyRows
    if isinstance(index.row_lengths, int):
        rows = PackedRows(datasets, index, pad_id=pad_id)
    elif tokenizer is None and index.row_lengths.encoder_eos and arguments.show:
        raise ConfigError("inputs of these rows end with EOS, whose id a tokenizer knows: give --tokenizer DIR.")
    else:
        # What a decoder starts with is not shown: the labels are.
        eos_id = tokenizer.eos_id if tokenizer else 0
        rows = EncoderDecoderRows(datasets, index, pad_id=pad_id, eos_id=eos_id, decoder_start_id=pad_id)
    shown = [
        show_row(
            rows,
            number,
            tokenizer=tokenizer,
            normalization=config.loss.normalization if config else None,
            micro_batch_size=config.batch.micro_batch_size if config else 1,
            step_rows=config.batch.step_rows if config else StepRows(1),
        )
        for number in range(arguments.row, min(arguments.row + arguments.show, len(index)))
    ]
    parts = [text]
    if shown and tokenizer is None:
        parts.append("token ids: there is no tokenizer to decode them with, give --tokenizer DIR")
    colour = uses_colour()
    parts += [word_row(row, tokenizer=tokenizer, colour=colour, show_ids=arguments.ids) for row in shown]
    return {**report, "rows": shown}, "\n\n".join(parts)


def _word_sides(statistics: PackingStatistics) -> str:
    if "encoder_fill_fraction" not in statistics:
        return ""
    sides = [f"{side} {100 * statistics[f'{side}_fill_fraction']:.2f} %" for side in ("encoder", "decoder")]  # type: ignore[literal-required]
    return f" ({', '.join(sides)}; no packing has fewer than {statistics['fewest_rows']:,} rows)"


def _describe_packing(path: Path, index: PackingIndex) -> tuple[dict[str, Any], str]:
    from megatron_xmtf.config.row_lengths import word_lengths

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
        f"{path}: packing index, {statistics['rows']:,} rows of {word_lengths(index.row_lengths)}, "
        f"{100 * statistics['fill_fraction']:.2f} % filled{_word_sides(statistics)}",
        f"examples   {statistics['examples']:,} in {statistics['epochs']} epochs; {statistics['dropped']:,} dropped, "
        f"{statistics['truncated']:,} truncated, {statistics['empty']:,} without target ({index.long_examples})",
        *(f"  {entry['name']}  {entry['examples']:,} examples" for entry in statistics["datasets"]),
        "whole and unaltered: every SHA-256 is that of packing.json",
    ]
    return report, "\n".join(lines)


def load_tokenizer(arguments: argparse.Namespace) -> Tokenizer | None:
    """Load what `--tokenizer` names."""
    from megatron_xmtf.data.tokenizer import Tokenizer

    return Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
