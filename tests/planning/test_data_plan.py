"""The plan's figures equal those of a loop over the rows that training reads, token by token."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.loader import BatchLoader
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import index_directory, open_packing_index
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.planning import draws, lengths, tally
from megatron_xmtf.planning.data_plan import build_data_plan
from tests.planning.tiny_mixture import run_config, write_dataset, write_mixture


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


def names_of(dataset: Any, example: int) -> tuple[str, str, str]:
    """Read an example's dataset, language and template off its columns, the plain way."""
    found = []
    for column, missing in (("dataset", dataset.name), ("language", "(unknown)"), ("template", "(unknown)")):
        values = dataset.column(column)
        found.append((dataset.names(column)[values[example]] if values is not None else "") or missing)
    return found[0], found[1], found[2]


def count_rows(config: RunConfig) -> dict[str, Any]:
    """Count the rows of a run with loops, through the batches that training reads."""
    datasets = open_datasets(config.data.training_datasets)
    index = open_packing_index(
        datasets,
        data=config.data,
        sequence_length=config.batch.sequence_length,
        rows_needed=config.train_rows,
        seed=config.seed,
        directory=index_directory(config),
    )
    rows = PackedRows(datasets, index, pad_id=3)
    loader = BatchLoader(
        rows,
        micro_batch_size=config.batch.micro_batch_size,
        step_rows=config.batch.step_rows,
        data_parallel_rank=0,
        data_parallel_size=1,
        normalization=config.loss.normalization,
    )
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    reads: Counter[tuple[int, int]] = Counter()
    loss: dict[tuple[str, str], float] = defaultdict(float)
    templates: Counter[str] = Counter()
    row_tokens, drawn_lengths = [], []
    for step in range(config.train_steps):
        for batch in loader.micro_batches(step):
            for place, row in enumerate(batch.rows):
                row_tokens.append(sum(1 for segment in row.segment_ids.tolist() if segment))
                for number in range(len(row.example_ids)):
                    dataset, example = int(row.dataset_ids[number]), int(row.example_ids[number])
                    name, language, template = names_of(datasets[dataset], example)
                    tokens = sum(1 for segment in row.segment_ids.tolist() if segment == number + 1)
                    weights = batch.loss_weights[place].tolist()
                    own = [
                        w for w, s in zip(weights, row.segment_ids[1:].tolist(), strict=True) if s == number + 1 and w
                    ]
                    cells[name, language].update(examples=1, tokens=tokens, target_tokens=len(own))
                    loss[name, language] += sum(own)
                    reads[dataset, example] += 1
                    templates[template] += 1
                    drawn_lengths.append(tokens)
    capacity, policy = config.batch.sequence_length + 1, config.data.long_examples
    available: Counter[tuple[str, str]] = Counter()
    most: Counter[tuple[str, str]] = Counter()
    for number, dataset in enumerate(datasets):
        for example in range(len(dataset)):
            name, language, _ = names_of(dataset, example)
            cell, (inputs, targets) = cells[name, language], dataset[example]
            cell["records"] += 1
            fits = len(inputs) + len(targets) <= capacity
            can_be_cut = policy != "drop" and len(inputs) > 0 and len(targets) < capacity
            cell["dropped"] += not fits and not can_be_cut
            cell["truncated"] += not fits and can_be_cut
            available[name, language] += fits or can_be_cut
            times = reads[number, example]
            cell["distinct_examples"] += times > 0
            most[name, language] = max(most[name, language], times)
    return {
        "cells": cells,
        "loss": loss,
        "available": available,
        "most": most,
        "templates": templates,
        "row_tokens": row_tokens,
        "lengths": drawn_lengths,
    }


@pytest.mark.parametrize("normalization", ["target_token", "target_sequence", "target_sequence_per_micro_batch"])
@pytest.mark.parametrize("policy", ["drop", "truncate_inputs_left"])
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_every_figure_equals_that_of_a_loop_over_the_rows(
    prefixes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    normalization: str,
    policy: str,
    blocks: bool,
) -> None:
    if blocks:
        monkeypatch.setattr(draws, "BLOCK_SEGMENTS", 7)
        monkeypatch.setattr(tally, "BLOCK_EXAMPLES", 5)
        monkeypatch.setattr(lengths, "BLOCK_EXAMPLES", 3)
    train = [{"prefix": prefixes[0], "weight": 3}, {"prefix": prefixes[1], "weight": 1}]
    config = run_config(
        tmp_path, prefixes, data={"train": train, "long_examples": policy}, loss={"normalization": normalization}
    )
    plan = build_data_plan(config, by=["template"])
    counted = count_rows(config)

    assert {(row["dataset"], row["language"]) for row in plan["cells"]} == set(counted["cells"])
    whole = sum(counted["loss"].values())
    for row in plan["cells"]:
        key = (row["dataset"], row["language"])
        cell = counted["cells"][key]
        for name in ("records", "examples", "tokens", "target_tokens", "dropped", "truncated", "distinct_examples"):
            assert row[name] == cell[name], (key, name)
        assert row["empty"] == 0 and row["selected"] == row["records"]
        assert row["available"] == counted["available"][key]
        assert row["most_draws"] == counted["most"][key]
        assert row["epochs"] == pytest.approx(cell["examples"] / counted["available"][key])
        assert row["loss_fraction"] == pytest.approx(counted["loss"][key] / whole, rel=1e-5), key
    lost = "dropped" if policy == "drop" else "truncated"
    assert sum(cell[lost] for cell in counted["cells"].values()) > 0, "the policy has something to do"

    run = plan["run"]
    assert run["examples"] == len(counted["lengths"])
    assert run["tokens"] == sum(counted["row_tokens"]) == sum(counted["lengths"])
    assert run["rows"] == len(counted["row_tokens"]) == 60
    assert run["row_fill"]["mean_fraction"] == pytest.approx(run["tokens"] / (60 * 33))
    assert run["row_fill"]["lowest_fraction"] == pytest.approx(min(counted["row_tokens"]) / 33)
    assert {row["template"]: row["examples"] for row in plan["by"]["template"]} == counted["templates"]
    assert plan["lengths"]["median"] == sorted(counted["lengths"])[(len(counted["lengths"]) - 1) // 2]
    assert plan["lengths"]["mean"] == pytest.approx(sum(counted["lengths"]) / len(counted["lengths"]))
    edges = plan["lengths"]["edges"]
    assert edges[-1] == 34
    for place, count in enumerate(plan["lengths"]["examples"][:-1]):
        assert count == sum(1 for length in counted["lengths"] if edges[place] <= length < edges[place + 1])


def test_totals_are_sums_of_the_cells(prefixes: list[str], tmp_path: Path) -> None:
    plan = build_data_plan(run_config(tmp_path, prefixes))
    for column, rows in (("dataset", plan["datasets"]), ("language", plan["languages"])):
        assert [row["loss_fraction"] for row in rows] == sorted((row["loss_fraction"] for row in rows), reverse=True)
        for row in rows:
            parts = [cell for cell in plan["cells"] if cell[column] == row[column]]
            for name in ("records", "examples", "tokens", "target_tokens", "dropped"):
                assert row[name] == sum(part[name] for part in parts)
            assert row["loss_fraction"] == pytest.approx(sum(part["loss_fraction"] for part in parts))
            assert row["most_draws"] == max(part["most_draws"] for part in parts)
    assert {row["dataset"] for row in plan["datasets"]} == {"squad", "tydi", "topics"}
    assert {row["language"] for row in plan["languages"]} == {"sw", "yo", "th", "(unknown)"}
    assert [row["entry"] for row in plan["entries"]] == ["qa", "topics"]
    for row, part in zip(plan["entries"], plan["components"], strict=True):
        assert (part["name"], part["examples"]) == (row["entry"], row["examples"])
        assert part["share"] == pytest.approx(row["example_fraction"])
    assert [part["wanted_share"] for part in plan["components"]] == pytest.approx([0.75, 0.25])


def test_by_hand(tmp_path: Path) -> None:
    """Four examples of five tokens: "ab", and " c" with its end; rows of ten; two rows are one pass."""
    from tests.tiny import write_tiny_tokenizer

    write_tiny_tokenizer(tmp_path / "tokenizer")
    records = [{"inputs": "ab", "targets": "c", "language": language} for language in ("sw", "sw", "sw", "yo")]
    prefix = write_dataset(tmp_path / "four", records, tmp_path / "tokenizer")
    sizes = {"micro_batch_size": 1, "global_batch_size": 2, "sequence_length": 9}
    config = run_config(tmp_path, [], data={"train": [{"prefix": prefix}]}, batch=sizes, schedule={"train_steps": 3})
    plan = build_data_plan(config)
    run = plan["run"]
    assert (run["rows"], run["examples"], run["tokens"], run["target_tokens"], run["epochs"]) == (6, 12, 60, 36, 3.0)
    assert (run["examples_per_step"], run["tokens_per_step"], run["target_tokens_per_step"]) == (4, 20, 12)
    assert run["row_fill"] == {"mean_fraction": 1.0, "percentile_1_fraction": 1.0, "lowest_fraction": 1.0}
    assert [(row["language"], row["examples"], row["loss_fraction"]) for row in plan["languages"]] == [
        ("sw", 9, 0.75),
        ("yo", 3, 0.25),
    ]
    assert (plan["lengths"]["median"], plan["lengths"]["longest"], plan["lengths"]["mean"]) == (5, 5, 5.0)
    assert plan["unit"] is None and plan["warnings"] == []


def test_a_batch_size_ramp_by_hand(prefixes: list[str], tmp_path: Path) -> None:
    # One increment after each 6 rows: steps of 2, 2, 2, 3, 3, 4, 4 and 4 rows; 18 rows of warm-up are the first seven.
    ramp = {"start": 2, "increment": 1, "rows": 12}
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 32, "rampup_batch_size": ramp}
    plan = build_data_plan(run_config(tmp_path, prefixes, batch=batch, schedule={"train_steps": 8}))
    assert (plan["run"]["steps"], plan["run"]["rows"], plan["run"]["rows_per_step"]) == (8, 24, 3.0)
    for warmup, steps in (({"lr_warmup_rows": 18}, 7), ({"lr_warmup_rows": 16}, 6), ({"lr_warmup_steps": 3}, 3)):
        planned = build_data_plan(run_config(tmp_path, prefixes, batch=batch, schedule={"train_steps": 8, **warmup}))
        assert planned["run"]["warmup_steps"] == steps


def test_what_a_mixture_leaves_out_is_not_called_dropped(prefixes: list[str], tmp_path: Path) -> None:
    entry = {"prefix": prefixes[0], "split": "0:0.7", "where": {"language": ["sw", "yo"]}, "max_examples": 10}
    config = run_config(tmp_path, prefixes, data={"mixture": {"entries": [entry]}})
    plan = build_data_plan(config)
    (row,) = plan["entries"]
    assert row["records"] == 60
    assert row["available"] == 10
    assert row["selected"] < 60
    languages = {one["language"]: one for one in plan["languages"]}
    assert languages["th"]["records"] == 12
    assert languages["th"]["selected"] == languages["th"]["dropped"] == languages["th"]["examples"] == 0
    long = sum(
        1
        for dataset in open_datasets(config.data.training_datasets)
        for example in range(60)
        if sum(map(len, dataset[example])) > 33
    )
    assert 0 < row["dropped"] < long, "too long ones that are not selected do not count"
    assert plan["unit"] == "examples" and plan["components"][0]["available"] == 10


def test_plan_builds_the_index_that_training_opens(prefixes: list[str], tmp_path: Path) -> None:
    config = run_config(tmp_path, prefixes)
    plan = build_data_plan(config)
    assert Path(plan["index"]).is_dir() and Path(plan["index"]).parent == tmp_path / "run" / "packing"
    index = open_packing_index(
        open_datasets(config.data.training_datasets),
        data=config.data,
        sequence_length=32,
        rows_needed=60,
        seed=42,
        directory=index_directory(config),
    )
    assert index.key == plan["key"]
    assert build_data_plan(config) == plan, "the same again, from the stored index"


def test_column_that_is_not_there_and_uneven_batches_are_refused(prefixes: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no dataset has a column 'tempalte'.*template"):
        build_data_plan(run_config(tmp_path, prefixes), by=["tempalte"])
    sizes = {"micro_batch_size": 3, "global_batch_size": 4, "sequence_length": 32}
    with pytest.raises(ConfigError, match="global_batch_size=4 is not a multiple"):
        build_data_plan(run_config(tmp_path, prefixes, batch=sizes))


def test_edges_of_the_length_histogram() -> None:
    assert lengths.length_edges(20) == [1, 2, 3, 4, 6, 8, 12, 16, 21]
    for capacity in range(1, 300):
        edges = lengths.length_edges(capacity)
        assert edges == sorted(set(edges)) and edges[0] == 1 and edges[-1] == capacity + 1


def test_validation_says_what_of_it_is_trained_on(prefixes: list[str], tmp_path: Path) -> None:
    """ "qa" has an id in every record, so each is a document of its own."""

    def plan(train_split: str, validation_split: str) -> Any:
        data = {
            "train": [{"prefix": prefixes[0], "split": train_split}],
            "validation": [{"prefix": prefixes[0], "name": "held_out", "split": validation_split}],
        }
        return build_data_plan(run_config(tmp_path, prefixes, data=data))

    apart = plan("0:0.8", "0.8:1")
    assert apart["validation"][0]["trained_on"] == 0
    assert apart["validation"][0]["selected"] + apart["entries"][0]["selected"] == 60
    assert not [warning for warning in apart["warnings"] if warning["kind"] == "validation"]
    both = plan("0:1", "0.8:1")
    assert both["validation"][0]["trained_on"] == apart["validation"][0]["selected"] > 0
    (warning,) = [one for one in both["warnings"] if one["kind"] == "validation"]
    assert warning["message"].startswith(
        "100 % of the validation records of held_out are of documents that are trained"
    )


GUARDED = "Which of the seven rivers of the eastern province is the longest one that reaches the sea?"


@pytest.mark.parametrize("action", ["report", "drop"])
def test_guards_are_counted_by_language_and_kept_out_where_asked(tmp_path: Path, action: str) -> None:
    """Record 1 repeats record 0 (sw), and 5 holds the question of the task (yo)."""
    from tests.tiny import write_tiny_tokenizer

    write_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    subjects = ["granite", "maize", "harbour", "violin", "glacier", "parliament", "monsoon", "saffron"]
    records = [
        {"inputs": f"Say what {subject} is, and no more.", "targets": f"{subject}!", "language": language}
        for language in ("sw", "yo")
        for subject in (subjects[:4] if language == "sw" else subjects[4:])
    ]
    records[1] = dict(records[0])
    records[5]["inputs"] = GUARDED
    prefix = write_dataset(tmp_path / "guarded", records, tmp_path / "model")
    question = {"inputs": GUARDED, "targets": "the Tana", "choices": ["the Tana", "the Mara"], "language": "en"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: rivers, records: questions.jsonl}\n")
    guards = {"duplicates": action, "contamination": action}

    def plan(**sections: Any) -> Any:
        return build_data_plan(
            run_config(
                tmp_path,
                [],
                data={"train": [{"prefix": prefix}], "guards": guards},
                batch={"global_batch_size": 1, "sequence_length": 127},
                schedule={"train_steps": 30},
                **{"evaluation": {"tasks": [str(tmp_path / "tasks.yaml")]}, **sections},
            )
        )

    found = plan()
    languages = {row["language"]: row for row in found["languages"]}
    assert found["guards"]["checked"] == ["duplicates", "contaminated"]
    assert [(languages[name]["duplicates"], languages[name]["contaminated"]) for name in ("sw", "yo")] == [
        (1, 0),
        (0, 1),
    ]
    assert "near_duplicates" not in languages["sw"]
    (warning,) = [one["message"] for one in found["warnings"] if one["kind"] == "contamination"]
    assert warning.startswith("1 of the 8 guarded records hold texts of rivers, which the run is evaluated on: ")
    available = [languages[name]["available"] for name in ("sw", "yo")]
    assert available == ([3, 3] if action == "drop" else [4, 4])
    assert [languages[name]["dropped"] for name in ("sw", "yo")] == [0, 0], "kept out, but not for their length"
    assert found["entries"][0]["distinct_examples"] == sum(available)
    if action == "report":
        assert plan(model="nowhere")["guards"]["not_checked"].keys() == {"duplicates", "contamination"}
        untested = plan(evaluation={})
        assert untested["guards"]["not_checked"] == {"contamination": "evaluation.tasks names no task"}
        assert untested["guards"]["checked"] == ["duplicates"]
        assert "contaminated" not in untested["entries"][0] and untested["entries"][0]["duplicates"] == 1


@pytest.mark.parametrize("ramp", [None, {"start": 2, "increment": 1, "rows": 12}], ids=["constant", "ramp"])
@pytest.mark.parametrize("block_segments", [1, 1 << 21], ids=["blocks", "whole"])
def test_each_dataset_of_a_step_has_the_same_part_of_the_loss(
    ramp: Any, block_segments: int, prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that training gives, divided by each step's units, against the plan's parts of the loss."""
    train = [{"prefix": prefixes[0], "weight": 3}, {"prefix": prefixes[1], "weight": 1}]
    monkeypatch.setattr(draws, "BLOCK_SEGMENTS", block_segments)
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 32, "rampup_batch_size": ramp}
    config = run_config(tmp_path, prefixes, data={"train": train}, loss={"normalization": "dataset"}, batch=batch)
    plan = build_data_plan(config)
    datasets = open_datasets(config.data.training_datasets)
    index = open_packing_index(
        datasets,
        data=config.data,
        sequence_length=config.batch.sequence_length,
        rows_needed=config.train_rows,
        seed=config.seed,
        directory=index_directory(config),
    )
    rows = PackedRows(datasets, index, pad_id=3)
    loader = BatchLoader(
        rows,
        micro_batch_size=1,
        step_rows=config.batch.step_rows,
        data_parallel_rank=0,
        data_parallel_size=1,
        normalization="dataset",
    )
    parts = [0.0, 0.0]
    for step in range(config.train_steps):
        batches = loader.micro_batches(step)
        units = sum(batch.num_loss_units for batch in batches)
        for batch in batches:
            (row,) = batch.rows
            for weight, segment in zip(batch.loss_weights[0].tolist(), row.segment_ids[:-1].tolist(), strict=True):
                if weight:
                    parts[row.dataset_ids[segment - 1]] += weight / units / config.train_steps
    assert sum(parts) == pytest.approx(1, rel=1e-6)
    assert [row["loss_fraction"] for row in plan["entries"]] == pytest.approx(parts, rel=1e-5)
