"""Steps under loss.normalization=dataset are the same at every layout and micro-batch size, packed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.loss import global_batch_loss, micro_batch_loss
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import LAYOUTS
from tests.tiny import random_examples, write_records

STEPS = 3
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (LAYOUTS[name][0], {"parallel": LAYOUTS[name][1]}) for name in ("DP2", "PP2", "TP2-PP2")},
    "micro-batch-1": (1, {"batch": {"micro_batch_size": 1, "global_batch_size": 8, "sequence_length": 64}}),
    "micro-batch-4": (1, {"batch": {"micro_batch_size": 4, "global_batch_size": 8, "sequence_length": 64}}),
}


def rank_curve(prepared: PreparedRun) -> list[tuple[float, float]]:
    topology = initialize_parallel(prepared.config.parallel, seed=prepared.config.seed)
    trainer = Trainer(prepared, topology)
    return [(step["loss"], step["grad_norm"]) for step in (trainer.train_step() for _ in range(STEPS))]


@pytest.fixture(scope="module")
def two_datasets(tiny_hf: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("other")
    write_records(directory / "other.jsonl", 100, seed=1)
    preprocess(
        [directory / "other.jsonl"], tokenizer=Tokenizer.load(tiny_hf), output_prefix=directory / "other", workers=1
    )
    return [tiny_pairs, directory / "other"]


def curve(
    run_config: Callable[..., RunConfig], pairs: list[Path], world_size: int, normalization: str, **sections: Any
) -> list[tuple[float, float]]:
    train = [
        {"prefix": str(pairs[0]), "weight": 5},
        {"prefix": str(pairs[1]), "weight": 1},
    ]
    config = run_config(data={"train": train}, loss={"normalization": normalization}, **sections)
    prepared = prepare_run(config, world_size=world_size)
    curves: list[list[tuple[float, float]]] = run_ranks(rank_curve, world_size=world_size, arguments=(prepared,))
    return curves[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_curve_equals_one_process(name: str, two_datasets: list[Path], run_config: Callable[..., RunConfig]) -> None:
    world_size, sections = VARIANTS[name]
    reference = curve(run_config, two_datasets, 1, "dataset")
    assert reference != curve(run_config, two_datasets, 1, "target_token"), "the weights must matter"
    for ours, wanted in zip(curve(run_config, two_datasets, world_size, "dataset", **sections), reference, strict=True):
        assert ours[0] == pytest.approx(wanted[0], rel=1e-5)
        assert ours[1] == pytest.approx(wanted[1], rel=1e-4)


def test_packed_equals_unpacked() -> None:
    examples = random_examples(12)
    datasets = np.arange(12, dtype=np.uint16) % 3

    def named(row: Row, first: int) -> Row:
        return Row(row.tokens, row.segment_ids, row.is_target, datasets[first + row.example_ids], row.example_ids)

    counts = np.array([sum(len(targets) for _, targets in examples[dataset::3]) for dataset in range(3)])
    packed = [named(row, 0) for row in pack_examples(examples, sequence_length=64, pad_id=3)]
    alone = [
        named(pack_examples([example], sequence_length=64, pad_id=3)[0], number)
        for number, example in enumerate(examples)
    ]
    assert len(packed) < len(alone)
    losses = []
    for rows in (packed, alone):
        batches = [build_batch([row], normalization="dataset", dataset_target_tokens=counts) for row in rows]
        reports = [micro_batch_loss(batch, batch.labels.float())[2] for batch in batches]
        weighted, units = global_batch_loss(reports).tolist()
        losses.append(weighted / units)
    by_hand = [np.mean([token for _, targets in examples[dataset::3] for token in targets]) for dataset in range(3)]
    assert losses == pytest.approx([float(np.mean(by_hand))] * 2, rel=1e-6)
