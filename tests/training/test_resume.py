"""What may change between two parts of a run, and what may not; a run that was interrupted goes on as if it had not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.errors import ConfigMismatchError, ExitCode
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.prepare import prepare_run
from megatron_xmtf.training.resume import check_same_run
from megatron_xmtf.training.trainer import train_rank
from tests.layouts import LAYOUTS


def run(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m",
        "output": "o",
        "data": {"train": [{"prefix": "first"}, {"prefix": "second"}]},
        "schedule": {"train_steps": 10},
        **sections,
    }
    return config_from_mapping(values, RunConfig, source="test")


def saved(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint's manifest keeps of a configuration."""
    return json.loads(json.dumps(config.model_dump(mode="json")))


def test_the_same_run_goes_on() -> None:
    check_same_run(run(), saved(run()), allowed_changes=[])


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}},
        {"output": "elsewhere", "model": "moved"},
        {"batch": {"micro_batch_size": 4}},
        {"checkpoint": {"save_interval": 5, "resume": 3}},
        {
            "data": {"train": [{"prefix": "first"}, {"prefix": "second"}], "validation": [{"prefix": "v"}]},
            "evaluation": {"interval": 2},
        },
        {"logging": {"log_interval": 7}},
        {"kernels": {"attention": "reference"}},
        {"recompute": {"granularity": "full"}},
        {"schedule": {"train_steps": 20}},
        {"data": {"train": [{"prefix": "first"}, {"prefix": "second"}], "validation": [{"prefix": "v"}]}},
        {"data": {"train": [{"prefix": "first"}, {"prefix": "second"}], "build_index": False, "index_directory": "i"}},
    ],
)
def test_what_does_not_change_the_curve_is_free(sections: dict[str, Any]) -> None:
    check_same_run(run(**sections), saved(run()), allowed_changes=[])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"lr": 1e-3}}, "optimizer.lr: 2e-05 -> 0.001"),
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"precision": "fp32"}, "precision: 'bf16' -> 'fp32'"),
        ({"batch": {"sequence_length": 64}}, "batch.sequence_length: 2048 -> 64"),
        ({"loss": {"normalization": "target_token"}}, "loss.normalization: 'target_sequence' -> 'target_token'"),
        ({"schedule": {"train_steps": 10, "lr_warmup_steps": 2}}, "schedule.lr_warmup_steps: 0 -> 2"),
        ({"data": {"train": [{"prefix": "first"}]}}, "data.train.1.prefix: 'second' -> None"),
        ({"data": {"train": [{"prefix": "second"}, {"prefix": "first"}]}}, "data.train.0.prefix: 'first' -> 'second'"),
        (
            {"data": {"train": [{"prefix": "first"}, {"prefix": "second"}], "long_examples": "error"}},
            "data.long_examples: 'drop' -> 'error'",
        ),
    ],
)
def test_what_changes_the_curve_is_named_with_both_values(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigMismatchError) as caught:
        check_same_run(run(**sections), saved(run()), allowed_changes=[])
    assert words in str(caught.value)
    assert "--allow-change" in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIG_MISMATCH


def test_the_global_batch_is_the_cursor_and_never_changes() -> None:
    with pytest.raises(ConfigMismatchError, match="global_batch_size is 8, the resumed checkpoint's is 2048"):
        check_same_run(run(batch={"global_batch_size": 8}), saved(run()), allowed_changes=["batch"])


def test_a_batch_size_ramp_is_part_of_the_cursor_and_never_changes() -> None:
    ramp = {"start": 1024, "increment": 512, "rows": 100_000}
    before = run(batch={"rampup_batch_size": ramp})
    check_same_run(before, saved(before), allowed_changes=[])
    changed = run(batch={"rampup_batch_size": {**ramp, "rows": 90_000}})
    with pytest.raises(
        ConfigMismatchError, match="rampup_batch_size.rows is 90000, the resumed checkpoint's is 100000"
    ):
        check_same_run(changed, saved(before), allowed_changes=["batch"])
    with pytest.raises(ConfigMismatchError, match="rampup_batch_size.increment is None, .* 512: the place in the data"):
        check_same_run(run(), saved(before), allowed_changes=["batch"])
    without = saved(run())
    del without["batch"]["rampup_batch_size"]  # a checkpoint from before there were ramps
    check_same_run(run(), without, allowed_changes=[])


def test_micro_batches_are_part_of_a_loss_that_is_divided_within_them() -> None:
    loss = {"normalization": "target_sequence_per_micro_batch"}
    with pytest.raises(ConfigMismatchError, match=r"batch\.micro_batch_size: 1 -> 4"):
        check_same_run(run(loss=loss, batch={"micro_batch_size": 4}), saved(run(loss=loss)), allowed_changes=[])


def test_every_difference_is_named_at_once() -> None:
    with pytest.raises(ConfigMismatchError, match=r"optimizer\.lr: .*; seed: "):
        check_same_run(run(optimizer={"lr": 1.0}, seed=3), saved(run()), allowed_changes=[])


@pytest.mark.parametrize("allowed", [["optimizer.lr"], ["optimizer"], ["seed", "optimizer"]])
def test_a_change_can_be_allowed_by_key_or_section(allowed: list[str]) -> None:
    check_same_run(run(optimizer={"lr": 1.0}), saved(run()), allowed_changes=allowed)


def test_allowing_one_key_does_not_allow_another_that_begins_alike() -> None:
    changed = run(optimizer={"adam_beta1": 0.8})
    with pytest.raises(ConfigMismatchError, match="adam_beta1"):
        check_same_run(changed, saved(run()), allowed_changes=["optimizer.adam_beta"])


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_decaying_run_may_not_be_made_longer(style: str) -> None:
    before = run(schedule={"train_steps": 10, "lr_decay_style": style})
    after = run(schedule={"train_steps": 20, "lr_decay_style": style})
    with pytest.raises(ConfigMismatchError, match=r"schedule\.train_steps: 10 -> 20"):
        check_same_run(after, saved(before), allowed_changes=[])


def test_a_key_that_the_checkpoint_did_not_know_is_named() -> None:
    before = saved(run())
    del before["seed"]
    with pytest.raises(ConfigMismatchError, match="seed: None -> 42"):
        check_same_run(run(), before, allowed_changes=[])


def train_to_the_end(config: RunConfig, world_size: int) -> list[dict[str, Any]]:
    run_ranks(train_rank, world_size=world_size, arguments=(prepare_run(config, world_size=world_size),))
    lines = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["TP2-SP", "PP2-VPP2"])
def test_within_a_batch_size_ramp_and_with_dropout_a_run_goes_on_bit_identical(
    name: str, run_config: Callable[..., RunConfig]
) -> None:
    world_size, section = LAYOUTS[name]
    ramp = {"start": 4, "increment": 4, "rows": 36}  # increments after 18 and 36 rows
    sections: dict[str, Any] = {
        "parallel": section,
        "batch": {
            "micro_batch_size": 1,
            "global_batch_size": 12,
            "sequence_length": 64,
            "rampup_batch_size": ramp,
        },
        "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        "schedule": {"train_rows": 72, "lr_decay_style": "linear"},
        "checkpoint": {"save_interval": 6},
    }
    config = run_config(**sections)
    whole = train_to_the_end(config, world_size)
    assert [step["rows"] for step in whole] == [4, 4, 4, 4, 4, 8, 8, 12, 12, 12]
    assert [step["learning_rate"] for step in whole][5:] == pytest.approx(
        [1e-3 * (72 - rows) / 72 for rows in (28, 36, 48, 60, 72)], abs=1e-12
    )
    checkpoints = Path(config.output) / "checkpoints"
    consumed = [open_manifest(checkpoints / f"step_{step:07d}").consumed_rows for step in (6, 10)]
    assert consumed == [28, 72]
    shutil.rmtree(checkpoints / "step_0000010")
    again = train_to_the_end(config, world_size)
    for before, after in zip(whole, again, strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "rows", "examples", "tokens", "target_tokens"):
            assert after[key] == before[key], f"{key} of step {before['step']}"
    # Other layouts read the same rows of each step.
    other = run_config(**{**sections, "parallel": {}, "output": config.output + "-other"})
    shutil.copytree(config.output, other.output)
    shutil.rmtree(Path(other.output) / "checkpoints" / "step_0000010")
    moved = train_to_the_end(other, 2)
    for before, after in zip(whole, moved, strict=True):
        assert [after[key] for key in ("rows", "examples", "tokens", "target_tokens")] == [
            before[key] for key in ("rows", "examples", "tokens", "target_tokens")
        ]
