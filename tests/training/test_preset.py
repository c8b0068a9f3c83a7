"""A preset: the closed form of 20B, weights that follow from the seed alone, a toy that learns, a real layout sized."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.conversion import initialize
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.initialize import initial_std, initialize_checkpoint
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, TokenizerError
from megatron_xmtf.models.presets import PRESETS, with_token_ids
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.dry_run import dry_run, size_stages
from megatron_xmtf.training.prepare import prepare_run
from megatron_xmtf.training.trainer import train_rank
from tests.layouts import PP, TP
from tests.tiny import write_tiny_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "[CLM]")
WORDS = ("river", "stone", "cloud", "maize", "tower", "ember", "lotus", "quill")
TOY = with_token_ids(PRESETS["alexatm-toy"], pad_id=3, eos_id=2)
EIGHTY_TWENTY = {
    "name": "eighty_twenty",
    "unit": "examples",
    "entries": [
        {"name": "denoising", "weight": 80, "prefix": "text", "objective": "alexatm_denoising"},
        {"name": "clm", "weight": 20, "prefix": "text", "objective": "causal"},
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the word [CLM], and documents of few words in a fixed round: something to be learnt."""
    directory = tmp_path_factory.mktemp("preset")
    write_tiny_tokenizer(directory / "tokenizer", special=SPECIAL)
    generator = np.random.default_rng(0)
    with open(directory / "text.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(120):
            start = int(generator.integers(0, len(WORDS)))
            text = " ".join(WORDS[(start + step) % len(WORDS)] for step in range(int(generator.integers(6, 9))))
            stream.write(json.dumps({"text": text, "language": "en", "dataset": "rounds"}) + "\n")
    preprocess(
        [directory / "text.jsonl"], tokenizer=directory / "tokenizer", output_prefix=directory / "text", kind="text"
    )
    return directory


@pytest.fixture
def run_config(place: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a RunConfig of the toy; keywords replace whole sections."""

    def make(**sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": "preset:alexatm-toy",
            "tokenizer": str(place / "tokenizer"),
            "output": str(tmp_path / "run"),
            "data": {"mixture": {**EIGHTY_TWENTY, "root": str(place)}},
            "batch": {"micro_batch_size": 2, "global_batch_size": 8, "encoder_length": 64, "decoder_length": 64},
            "schedule": {"train_steps": 12},
            "optimizer": {"lr": 3e-3},
            "precision": "fp32",
            "logging": {"log_interval": 1000},
            **sections,
        }
        return config_from_mapping(values, RunConfig, source="test")

    return make


def test_the_20b_has_the_published_size() -> None:
    """Counted by hand, sublayer by sublayer; the paper's 19.75 B within a quarter of a percent."""
    h, f, words, positions = 4096, 16_384, 150_000, 1024
    attention = (3 * h * h + 3 * h) + (h * h + h) + 2 * h
    feed_forward = (h * f + f) + (f * h + h) + 2 * h
    encoder = 46 * (attention + feed_forward) + 2 * h + (words + positions) * h
    decoder = 32 * (2 * attention + feed_forward) + 2 * h + (words + positions) * h
    count = PRESETS["alexatm-20b"].parameter_count
    assert count == encoder + decoder + words * h == 19_707_502_592
    assert count / 19.75e9 == pytest.approx(1, abs=2.5e-3)


def test_the_20b_is_sized_at_a_real_layout(run_config: Callable[..., RunConfig]) -> None:
    """128 ranks, as many as published: tensor 8 x pipeline 4 x data 4, on meta tensors."""
    config = run_config(
        parallel={TP: 8, PP: 4, "use_distributed_optimizer": True},
        batch={"global_batch_size": 2048, "encoder_length": 1024, "decoder_length": 1024},
        precision="bf16",
    )
    stages, parameters = size_stages(PRESETS["alexatm-20b"], config, world_size=128)
    assert parameters == 19_707_502_592
    assert sum(stage.layers * stage.count for stage in stages) == 46 + 32
    largest = max(stage.total_bytes for stage in stages)
    # Weights 2, gradients 4, optimizer 12 / 4 bytes a number: no rank has twice an even share of them.
    assert 9 * parameters / 32 < largest < 2 * 9 * parameters / 32


def test_a_toy_learns_the_mixture_and_opens_in_transformers(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(parallel={TP: 2, PP: 2})
    prepared = prepare_run(config, world_size=4)
    run_ranks(train_rank, world_size=4, arguments=(prepared,))
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 12 and all(math.isfinite(loss) for loss in losses)
    # Small random weights know nothing yet: every one of 512 words is as likely.
    assert losses[0] == pytest.approx(math.log(512), abs=0.15)
    assert losses[-1] < losses[0] - 1.5
    export_huggingface(config.output, Path(config.output) / "hf")
    opened, report = AutoModelForSeq2SeqLM.from_pretrained(Path(config.output) / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (opened.config.pad_token_id, opened.config.eos_token_id, opened.config.decoder_start_token_id) == (3, 2, 2)
    resumed = prepare_run(config, world_size=4)
    assert resumed.start.resumed and resumed.start.step == 12
    assert Tokenizer.load(resumed.hf_files).fingerprint == Tokenizer.load(str(config.tokenizer)).fingerprint


def read(directory: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(directory) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def test_weights_follow_from_the_seed_and_the_rules(place: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        initialize_checkpoint(TOY, tmp_path / name, tokenizer=place / "tokenizer", seed=seed)
    one, again, other = (read(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert sum(tensor.numel() for tensor in one.values()) == TOY.parameter_count
    for name, tensor in one.items():
        if name.endswith(".bias"):
            assert not tensor.any(), name
        elif "layernorm" in name:
            assert bool((tensor == 1).all()), name
        else:
            assert not torch.equal(tensor, other[name]), name
            # Four standard errors of a standard deviation out of n numbers.
            assert float(tensor.std()) == pytest.approx(initial_std(name, TOY), rel=4 / math.sqrt(2 * tensor.numel()))
            assert abs(float(tensor.mean())) < 4 * 0.02 / math.sqrt(tensor.numel()), name
    assert initial_std("encoder.layers.0.mlp.linear_fc2.weight", TOY) == pytest.approx(0.02 / math.sqrt(6))
    assert initial_std("decoder.layers.1.cross_attention.linear_proj.weight", TOY) == pytest.approx(0.02 / math.sqrt(6))
    tables = [name for name in one if "embeddings" in name or name == "output_layer.weight"]
    assert len({float(one[name].sum()) for name in tables}) == len(tables) == 5
    manifest = open_manifest(tmp_path / "one")
    assert (manifest.architecture, manifest.contents) == (TOY.to_mapping(), ("model",))


def test_every_block_has_a_generator_of_its_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows of 64 a block: the second block of a matrix is drawn again by hand, without the first."""
    monkeypatch.setattr(initialize, "BLOCK_NUMBERS", 640)
    initialize_checkpoint(TOY, tmp_path / "c", tokenizer=place / "tokenizer", seed=5)
    name = "encoder.layers.1.mlp.linear_fc1.weight"
    words = np.frombuffer(hashlib.sha256(f"5 {name} 10".encode()).digest(), np.uint32).tolist()
    wanted = 0.02 * np.random.default_rng(words).standard_normal((10, 64), dtype=np.float32)
    found = read(tmp_path / "c")[name]
    assert found.shape == (256, 64) and np.allclose(found[10:20].numpy(), wanted, rtol=1e-6, atol=0)
    assert not torch.equal(found[:10], found[10:20])


def test_rows_behind_the_vocabulary_are_zero(place: Path, tmp_path: Path) -> None:
    initialize_checkpoint(replace(TOY, vocab_size=300), tmp_path / "c", tokenizer=place / "tokenizer", seed=1)
    with CheckpointReader(tmp_path / "c") as reader:
        for name in ("encoder.embedding.word_embeddings.weight", "output_layer.weight"):
            table = reader.read(name)
            assert table.shape == (384, 64) and not table[300:].any() and bool(table[:300].any(dim=1).all())


def test_a_dry_run_draws_nothing(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    assert dry_run(config, world_size=1).parameters == TOY.parameter_count
    assert not (Path(config.output) / "initialized").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "preset:alexatm-20"}, ConfigError, "preset 'alexatm-20' is not known; nearest: alexatm-20b"),
        ({"model": "preset:alexatm-toy", "tokenizer": None}, ConfigError, "a preset needs tokenizer"),
        ({"model": "alexatm-toy", "tokenizer": None}, ConfigError, "give model=preset:alexatm-toy and tokenizer=DIR"),
        ({"model": "somewhere"}, ConfigError, "any other model has its own"),
        ({"tokenizer": "nowhere"}, TokenizerError, "nowhere is not a directory"),
        (
            {"batch": {"global_batch_size": 8, "encoder_length": 256, "decoder_length": 64}},
            ConfigError,
            "batch.encoder_length=256 is more than the model's 128 learned positions",
        ),
    ],
)
def test_a_random_start_is_asked_for_in_full(
    run_config: Callable[..., RunConfig], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare_run(run_config(**changes), world_size=1)
