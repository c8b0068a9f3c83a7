"""What may change between two parts of a run, and what may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.errors import ConfigMismatchError, ExitCode
from megatron_xmtf.training.resume import check_same_run


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
