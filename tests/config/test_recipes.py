"""The shipped recipes: arithmetic of the published figures, names, overlays, and each one trained small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import RunConfig, load_config
from megatron_xmtf.config.recipe import SHIPPED_RECIPES, merge_overlay
from megatron_xmtf.errors import ConfigError, MissingError

GIVEN = ["model=m", "output=o", "data.mixture_root=d"]

PUBLISHED = {
    # steps, rows a step, billions of tokens as published, tensor x pipeline, ranks
    "bloomz-560m": (1750, 1024, 3.67, (1, 1), 4 * 8),
    "bloomz-1b1": (6200, 1024, 13.0, (1, 2), 16 * 8),
    "bloomz-1b7": (2000, 2048, 8.39, (2, 2), 8 * 8),
    "bloomz-3b": (2000, 2048, 8.39, (1, 2), 16 * 8),
    "bloomz-7b1": (1000, 2048, 4.19, (1, 1), 8 * 8),
    "bloomz-176b": (498, 2048, 2.09, (1, 72), 36 * 8),
}


def recipe(name: str, *words: str) -> RunConfig:
    return load_config(name, [*GIVEN, *words])


def test_all_recipes_are_here() -> None:
    assert {path.stem for path in SHIPPED_RECIPES.glob("bloomz-*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_figures(name: str) -> None:
    config = recipe(name)
    steps, rows, billions, layout, ranks = PUBLISHED[name]
    assert (config.train_steps, config.batch.global_batch_size) == (steps, rows)
    tokens = config.train_steps * config.batch.global_batch_size * config.batch.sequence_length
    assert tokens / 1e9 == pytest.approx(billions, rel=2e-3)
    sizes = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    assert sizes == layout
    copies, rest = divmod(ranks, sizes[0] * sizes[1])
    assert rest == 0
    assert rows % (copies * config.batch.micro_batch_size) == 0
    assert f"data {copies} = {ranks} ranks" in (SHIPPED_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_sizes_have_in_common(name: str) -> None:
    config = recipe(name)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (2e-5, 1e-4, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert (config.schedule.lr_decay_style, config.warmup_rows) == ("constant", 0)
    assert (config.seed, config.recompute.granularity) == (42, "full")
    assert config.loss.normalization == "target_sequence_per_micro_batch"
    assert (config.dropout.hidden_dropout, config.dropout.attention_dropout) == (0.1, 0.1)
    assert config.precision == ("bf16" if name == "bloomz-176b" else "fp16")
    assert config.data.mixture is not None and config.data.mixture.name == "xp3"
    assert config.data.validation_datasets, "validation is measured on what the mixture holds out"


def test_a_name_that_is_nearly_a_recipe_is_answered_with_it() -> None:
    with pytest.raises(MissingError, match="'bloomz-560' is neither a file nor a shipped recipe; nearest: bloomz-560m"):
        load_config("bloomz-560")
    with pytest.raises(MissingError, match="'tony' is neither a file nor a shipped overlay; .*toy"):
        load_config("bloomz-560m", overlays=["tony"])


def test_a_file_in_the_way_is_taken_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bloomz-560m").write_text("seeed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key 'seeed', nearest: seed"):
        load_config("bloomz-560m", GIVEN)


def test_an_overlay_goes_key_by_key_and_overrides_come_last(tmp_path: Path) -> None:
    assert merge_overlay({"a": {"b": 1, "c": [2]}, "d": 3}, {"a": {"c": [4], "e": None}, "f": {"g": 5}}) == {
        "a": {"b": 1, "c": [4], "e": None},
        "d": 3,
        "f": {"g": 5},
    }
    mine = tmp_path / "mine.yaml"
    mine.write_text("optimizer: {lr: 3e-5, adam_beta2: 0.99}\n", encoding="utf-8")
    config = load_config("bloomz-1b1", [*GIVEN, "optimizer.lr=4e-5"], overlays=["toy", mine])
    assert (config.optimizer.lr, config.optimizer.adam_beta2, config.optimizer.weight_decay) == (4e-5, 0.99, 1e-4)
    assert config.train_steps == 6
    mine.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="mine.yaml holds a list"):
        load_config("bloomz-1b1", overlays=[mine])


@pytest.mark.parametrize(
    "name",
    # The others differ from these in sizes that the overlay sets.
    [
        pytest.param(name, marks=[] if name in ("bloomz-560m", "bloomz-176b") else [pytest.mark.slow])
        for name in PUBLISHED
    ],
)
def test_each_recipe_trains_small(
    name: str, tiny_checkpoint: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data={{train: [{{prefix: {tiny_pairs}}}], validation: [{{prefix: {tiny_pairs}, name: held}}]}}"
    words = [data, f"model={tiny_checkpoint}", f"output={tmp_path / 'run'}"]
    ranks = 4 if name == "bloomz-1b7" else 2
    assert main(["train", name, *words, "--overlay", "toy", "--nproc", str(ranks), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["last_step"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert not any(line["skipped"] for line in lines)
    assert "loss/held" in lines[-1]
