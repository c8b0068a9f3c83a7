"""The shipped recipes of encoder-decoders: published figures, all resolved, some of them trained small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import RunConfig, load_config
from megatron_xmtf.config.recipe import SHIPPED_RECIPES
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.errors import ConfigError
from tests.tiny import write_records, write_tiny_mt5, write_tiny_t5, write_tiny_tokenizer

GIVEN = ["output=o", "data.mixture_root=d"]
STEPS = {
    # As published, but for mt0-xl (not confirmed) and mt0-small (taken from base), which their files say.
    "mt0-small": 25_000,
    "mt0-base": 25_000,
    "mt0-large": 25_000,
    "mt0-xl": 10_000,
    "mt0-xxl": 7_000,
    "flan-t5-small": 98_000,
    "flan-t5-base": 84_000,
    "flan-t5-large": 64_000,
    "flan-t5-xl": 38_000,
    "flan-t5-xxl": 14_000,
    "alexatm-20b": 500_000,
}


def recipe(name: str) -> RunConfig:
    return load_config(name, [*GIVEN, "tokenizer=t" if name == "alexatm-20b" else "model=m"])


def test_all_recipes_are_here() -> None:
    found = {path.stem for path in SHIPPED_RECIPES.glob("*.yaml") if not path.stem.startswith("bloomz-")}
    assert found == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_a_recipe_has_the_published_figures(name: str) -> None:
    config, text = recipe(name), (SHIPPED_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    optimizer, batch = config.optimizer, config.batch
    assert config.train_steps == STEPS[name]
    lengths = (batch.encoder_length, batch.decoder_length)
    found = (
        optimizer.name,
        optimizer.lr,
        config.loss.normalization,
        config.dropout.hidden_dropout,
        config.dropout.attention_dropout,
    )
    if name.startswith("mt0"):
        assert lengths == (1024, 1024) and found == ("adafactor", 1e-3, "target_sequence", 0.1, 0.1)
        assert config.warmup_rows == 1000 * batch.global_batch_size
        # Rows that 4.62 B tokens in 25,000 steps fill, were they all inputs: 180.5.
        assert 4.62e9 / 25_000 / 1024 <= batch.global_batch_size < 4.62e9 / 25_000 / 1024 * 1.1
    elif name.startswith("flan"):
        assert lengths == (2048, 512) and found == ("adafactor", 5e-4, "target_token", 0.05, 0.05)
        assert (batch.global_batch_size, config.warmup_rows) == (64, 0)
    else:
        assert lengths == (1024, 1024) and found == ("adamw", 1e-4, "target_token", 0.1, 0.1)
        assert (optimizer.weight_decay, config.schedule.min_lr) == (0.1, 5e-6)
        assert config.train_rows * 1024 / 1e12 == pytest.approx(1, rel=0.05), "a trillion tokens"
        assert (config.preset, config.schedule.lr_decay_style) == ("alexatm-20b", "linear")
    if optimizer.name == "adafactor":
        assert (optimizer.adafactor_decay_rate, optimizer.weight_decay, optimizer.clip_grad) == (0.8, 0.0, 0.0)
        assert config.schedule.lr_decay_style == "constant"
    [layout] = re.findall(r"tensor (\d+) x pipeline (\d+) x data (\d+) = (\d+) ranks", text)
    tp, pp, dp, ranks = map(int, layout)
    parallel = config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (tp, pp)
    assert tp * pp * dp == ranks and batch.global_batch_size % (dp * batch.micro_batch_size) == 0
    assert f"--world-size {ranks}" in text
    assert bool(config.recompute.granularity == "full") == bool(re.search(r"recompute +whole layers", text))


def test_a_preset_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="a preset needs tokenizer"):
        load_config("alexatm-20b", GIVEN)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mT5, a tiny T5 and a tokenizer with [CLM], all with the same words; pairs, and documents."""
    directory = tmp_path_factory.mktemp("recipes")
    write_tiny_mt5(directory / "mt5")
    write_tiny_t5(directory / "t5", version="1.1")
    write_tiny_tokenizer(directory / "tokenizer", special=("<pad>", "</s>", "<unk>", "[CLM]"))
    write_records(directory / "pairs.jsonl", 200)
    preprocess([directory / "pairs.jsonl"], tokenizer=directory / "mt5", output_prefix=directory / "pairs", workers=1)
    generator = np.random.default_rng(0)
    with open(directory / "text.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(150):
            text = "abab" * int(generator.integers(4, 12))
            stream.write(json.dumps({"text": text, "language": "en"}) + "\n")
    preprocess(
        [directory / "text.jsonl"], tokenizer=directory / "tokenizer", output_prefix=directory / "text", kind="text"
    )
    return directory


@pytest.mark.parametrize(("name", "kind"), [("mt0-xxl", "mt5"), ("flan-t5-small", "t5"), ("alexatm-20b", "preset")])
def test_a_recipe_trains_small(
    name: str, kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = place / "text"
    if kind == "preset":
        entries = ", ".join(
            f"{{prefix: {text}, objective: {objective}, weight: {weight}}}"
            for objective, weight in (("alexatm_denoising", 80), ("causal", 20))
        )
        data = f"data={{train: [{entries}]}}"
        model = ["model=preset:alexatm-toy", f"tokenizer={place / 'tokenizer'}"]
    else:
        held = f", validation: [{{prefix: {place / 'pairs'}, name: held}}]" if name.startswith("mt0") else ""
        data = f"data={{train: [{{prefix: {place / 'pairs'}}}]{held}}}"
        model = [f"model={place / kind}"]
        if held:
            model += ["evaluation.interval=6", "evaluation.rows=4"]
    words = [data, *model, f"output={tmp_path / 'run'}", "--overlay", "toy-encoder-decoder", "--nproc", "2", "--json"]
    assert main(["train", name, *words]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["last_step"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert ("loss/held" in lines[-1]) == name.startswith("mt0")
