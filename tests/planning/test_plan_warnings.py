"""What a person should look at is said once, with its figures and the way out, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.planning.data_plan import build_data_plan
from megatron_xmtf.planning.plan_warnings import percent
from tests.planning.tiny_mixture import run_config, write_dataset
from tests.tiny import write_tiny_tokenizer


def records(language: str, count: int, *, inputs: int = 4, targets: int = 2, **fields: str) -> list[dict[str, Any]]:
    return [{"inputs": "a" * inputs, "targets": "b" * targets, "language": language, **fields} for _ in range(count)]


@pytest.fixture
def plan_of(tmp_path: Path) -> Any:
    """Plan a run on datasets of given records; keywords of the run are sections."""
    write_tiny_tokenizer(tmp_path / "tokenizer")

    def plan(datasets: dict[str, list[dict[str, Any]]], weights: list[float] | None = None, **sections: Any) -> Any:
        prefixes = [write_dataset(tmp_path / name, rows, tmp_path / "tokenizer") for name, rows in datasets.items()]
        train = [{"prefix": prefix} for prefix in prefixes]
        for entry, weight in zip(train, weights or [], strict=False):
            entry["weight"] = weight  # type: ignore[assignment]
        return build_data_plan(run_config(tmp_path, prefixes, **{"data": {"train": train}, **sections}))

    return plan


def messages(plan: Any, kind: str) -> list[str]:
    return [warning["message"] for warning in plan["warnings"] if warning["kind"] == kind]


ONE_STEP = {"schedule": {"train_steps": 1}, "batch": {"global_batch_size": 2, "sequence_length": 15}}


def test_a_sound_run_has_none(plan_of: Any) -> None:
    assert plan_of({"a": records("sw", 30) + records("yo", 30)}, **ONE_STEP)["warnings"] == []


def test_what_is_too_long(plan_of: Any) -> None:
    plan = plan_of({"a": records("sw", 44), "b": records("th", 44) + records("th", 6, inputs=90)}, **ONE_STEP)
    (by_dataset, by_language) = messages(plan, "lost")
    assert by_dataset.startswith("12 % of the b records (6 of 50) are too long and dropped: raise batch.sequence_le")
    assert by_language.startswith("12 % of the th records (6 of 50)")


def test_what_is_cut(plan_of: Any, tmp_path: Path) -> None:
    plan_of({"a": records("sw", 40) + records("sw", 10, inputs=90)}, **ONE_STEP)
    data = {"train": [{"prefix": str(tmp_path / "a")}], "long_examples": "truncate_inputs_left"}
    plan = build_data_plan(run_config(tmp_path, [], data=data, **ONE_STEP))
    (message,) = messages(plan, "lost")
    assert message.startswith("20 % of the a records (10 of 50) lose a part of their inputs")


def test_a_small_dataset_read_often(plan_of: Any) -> None:
    steps = {"schedule": {"train_steps": 60}, "batch": {"global_batch_size": 2, "sequence_length": 16}}
    plan = plan_of({"large": records("sw", 400), "small": records("yo", 4)}, [1, 1], **steps)
    dataset, language = messages(plan, "repeats")
    reads = next(row["epochs"] for row in plan["datasets"] if row["dataset"] == "small")
    assert reads > 25
    assert dataset.startswith(f"small is read {reads:,.1f} times and is ")
    assert language.startswith("yo is ") and f"its 4 examples are read {reads:,.1f} times" in language


def test_a_run_that_repeats_everything_says_so_once(plan_of: Any) -> None:
    steps = {"schedule": {"train_steps": 30}, "batch": {"global_batch_size": 2, "sequence_length": 16}}
    plan = plan_of({"a": records("sw", 8), "b": records("yo", 8)}, **steps)
    (message,) = messages(plan, "repeats")
    assert message.startswith("the run reads its data ") and "(now 30)" in message


def test_a_language_that_is_hardly_there_and_one_that_is_not_read(plan_of: Any) -> None:
    steps = {"schedule": {"train_steps": 300}, "batch": {"global_batch_size": 1, "sequence_length": 16}}
    plan = plan_of({"a": records("sw", 600) + records("yo", 1), "b": records("th", 5, inputs=50)}, None, **steps)
    assert messages(plan, "rare") == ["1 language is less than 0.5 % of the loss each: yo 0.17 %."]
    (dataset, language) = messages(plan, "unread")
    assert dataset == "b: 5 records, and none can be read." and language.startswith("th: 5 records")


def test_fill_warm_up_and_records_without_a_language(plan_of: Any) -> None:
    unnamed = [{"inputs": "aaaaaaa", "targets": "bb"} for _ in range(40)]
    plan = plan_of(
        {"a": records("sw", 40, inputs=7), "b": unnamed},
        schedule={"train_steps": 3, "lr_warmup_steps": 2},
        batch={"global_batch_size": 2, "sequence_length": 16},
    )
    assert messages(plan, "fill")[0].startswith("rows are only 64.7 % filled")
    assert messages(plan, "warmup") == ["2 of the 3 steps are warm-up: lower schedule.lr_warmup_steps."]
    assert "of the loss is of records that name no language" in messages(plan, "unknown")[0]


def test_long_targets_outweigh_under_target_token_alone(plan_of: Any, tmp_path: Path) -> None:
    data = {"short": records("sw", 95), "long": records("sw", 5, targets=60)}
    sizes = {"schedule": {"train_steps": 1}, "batch": {"global_batch_size": 13, "sequence_length": 69}}
    by_token = plan_of(data, loss={"normalization": "target_token"}, **sizes)
    (message,) = messages(by_token, "loss")
    long = next(row for row in by_token["datasets"] if row["dataset"] == "long")
    assert long["example_fraction"] < 0.06 and long["loss_fraction"] > 0.3
    assert message.startswith(f"long is {percent(long['example_fraction'])} of the examples but ")
    again = run_config(tmp_path, [], data={"train": [{"prefix": str(tmp_path / name)} for name in data]}, **sizes)
    assert not messages(build_data_plan(again), "loss"), "target_sequence weighs each target the same"


def test_a_component_that_its_max_epochs_holds(plan_of: Any, tmp_path: Path) -> None:
    plan_of({"large": records("sw", 400), "small": records("yo", 10)}, **ONE_STEP)
    entries = [
        {"prefix": str(tmp_path / "large"), "weight": 1},
        {"prefix": str(tmp_path / "small"), "weight": 1, "max_epochs": 2},
    ]
    config = run_config(
        tmp_path,
        [],
        data={"mixture": {"entries": entries}},
        schedule={"train_steps": 50},
        batch={"global_batch_size": 2, "sequence_length": 16},
    )
    plan = build_data_plan(config)
    small = plan["components"][1]
    assert small["examples"] == 20 and small["limited_by"] == "max_epochs"
    (message,) = [one for one in messages(plan, "limited") if one.startswith("small")]
    assert message == f"small should be 50 % of the examples and is {percent(20 / plan['run']['examples'])}: its " + (
        "max_epochs allows no more."
    )


def test_a_mixture_of_tokens_under_a_loss_of_targets(plan_of: Any, tmp_path: Path) -> None:
    plan_of({"short": records("sw", 100), "long": records("sw", 100, targets=40)}, **ONE_STEP)
    entries = [{"prefix": str(tmp_path / name), "weight": 1} for name in ("short", "long")]
    sizes = {"schedule": {"train_steps": 20}, "batch": {"global_batch_size": 2, "sequence_length": 127}}

    def warned(unit: str, normalization: str) -> list[str]:
        data = {"mixture": {"unit": unit, "entries": entries}}
        plan = build_data_plan(run_config(tmp_path, [], data=data, loss={"normalization": normalization}, **sizes))
        return messages(plan, "loss")

    (message,) = warned("target_tokens", "target_sequence")
    assert message.startswith("long is 5") and "of the mixture, which counts target tokens, but 9.4 % of" in message
    assert warned("target_tokens", "target_token") == [] == warned("examples", "target_sequence")
