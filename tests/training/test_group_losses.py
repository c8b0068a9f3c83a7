"""Training loss by dataset and language against `transformers`, example by example, at every kind of layout."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import PreparedRun, open_training_rows, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import LAYOUTS

STEPS = 2


@pytest.fixture(scope="module")
def silent_pairs(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second dataset, whose records say no language."""
    directory = tmp_path_factory.mktemp("silent")
    records = [{"inputs": f"say {word}", "targets": word} for word in ("one", "two", "three", "four") * 8]
    (directory / "s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    preprocess(
        [directory / "s.jsonl"], tokenizer=Tokenizer.load(tiny_hf), output_prefix=directory / "silent", workers=1
    )
    return directory / "silent"


def rank_report(prepared: PreparedRun) -> tuple[dict[str, float], dict[str, float], float]:
    """Train a few steps in one rank; return the report over them, one with nothing since, and the mean loss."""
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    losses = [trainer.train_step()["loss"] for _ in range(STEPS)]
    first = trainer.group_losses.report(topology.device)
    return first, trainer.group_losses.report(topology.device), sum(losses) / STEPS


def expected(prepared: PreparedRun, tiny_hf: Path, normalization: str) -> dict[str, float]:
    """Return the same means with `transformers` on each example by itself."""
    from transformers import BloomForCausalLM

    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).eval()
    rows = open_training_rows(prepared)
    names = rows.datasets[0].names("language")
    sums: dict[str, Any] = defaultdict(lambda: np.zeros(2))
    for number in range(STEPS * prepared.config.batch.global_batch_size):
        row = rows[number]
        for dataset, example in zip(row.dataset_ids.tolist(), row.example_ids.tolist(), strict=True):
            inputs, targets = rows.datasets[dataset][example]
            ids = torch.from_numpy(np.concatenate([inputs, targets]).astype(np.int64))[None]
            with torch.no_grad():
                log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
            losses = -log_probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(targets) :].double()
            pair = np.array([losses.sum(), len(targets)])
            if normalization == "target_sequence":
                pair = pair / len(targets)
            name = rows.datasets[dataset].name
            language = names[rows.datasets[0].column("language")[example]] if dataset == 0 else ""
            sums[f"train_loss/{name}"] += pair
            if language:
                sums[f"train_loss/{name}/{language}"] += pair
                sums[f"train_loss_by_language/{language}"] += pair
            sums["all"] += pair
    return {key: float(value / weight) for key, (value, weight) in sums.items()}


def prepared_run(
    run_config: Callable[..., RunConfig], pairs: list[Path], name: str, normalization: str
) -> tuple[int, PreparedRun]:
    world_size, section = (1, {}) if name == "TP1" else LAYOUTS[name]
    config = run_config(
        data={"train": [{"prefix": str(prefix)} for prefix in pairs]},
        parallel=section,
        loss={"normalization": normalization},
        optimizer={"lr": 1e-12},  # the weights stay those that `transformers` has
    )
    return world_size, prepare_run(config, world_size=world_size)


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("TP1", "target_sequence"),
        ("TP1", "target_token"),
        ("DP2", "target_token"),
        ("PP2-VPP2", "target_sequence"),
        ("TP2-SP-PP2-distributed-optimizer", "target_sequence"),
    ],
)
def test_means_equal_transformers(
    name: str,
    normalization: str,
    tiny_hf: Path,
    tiny_pairs: Path,
    silent_pairs: Path,
    run_config: Callable[..., RunConfig],
) -> None:
    world_size, prepared = prepared_run(run_config, [tiny_pairs, silent_pairs], name, normalization)
    reports = run_ranks(rank_report, world_size=world_size, arguments=(prepared,))
    assert all(report == reports[0] for report in reports), "every rank has the same means"
    means, nothing_since, mean_loss = reports[0]
    wanted = expected(prepared, tiny_hf, normalization)
    everything = wanted.pop("all")
    assert set(means) == set(wanted)
    assert {"train_loss/silent", "train_loss/tiny", "train_loss/tiny/en", "train_loss/tiny/fr"} < set(means)
    for key, value in means.items():
        assert value == pytest.approx(wanted[key], rel=1e-5), key
    assert abs(means["train_loss/tiny/en"] - means["train_loss/silent"]) > 1e-2, "groups must differ to tell them apart"
    assert mean_loss == pytest.approx(everything, rel=5e-3), "steps have unequal numbers of targets"
    assert nothing_since == {}
