"""The loss under each normalization: as `transformers` gives it by hand, the same however a global batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BloomForCausalLM

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.training.loss import global_batch_loss, micro_batch_loss
from megatron_xmtf.training.prepare import open_training_rows, prepare_run
from tests.conftest import make_run_config
from tests.layouts import LAYOUTS
from tests.tiny import random_examples, write_records
from tests.training.curves import Curve, Run, curves, unpack

STEPS, MICRO, GLOBAL = 3, 2, 8
TOLERANCE = 1e-5
NORMALIZATIONS = ["target_token", "target_sequence", "target_sequence_per_micro_batch", "dataset"]


def batch(micro_batch_size: int) -> dict[str, Any]:
    return {"batch": {"micro_batch_size": micro_batch_size, "global_batch_size": GLOBAL, "sequence_length": 64}}


LAYOUT_VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    name: (LAYOUTS[name][0], {"parallel": LAYOUTS[name][1]}) for name in ("DP2", "PP2", "TP2-PP2")
}
CUT_VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batch-1": (1, batch(1)),
    "micro-batch-4": (1, batch(4)),
    "unpacked": (1, {}),
}


@pytest.fixture(scope="module")
def make(
    tiny_hf: Path, tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """Return a function that configures a run over two datasets, one of which is read five times as often."""
    directory = tmp_path_factory.mktemp("normalizations")
    write_records(directory / "other.jsonl", 100, seed=1)
    preprocess(
        [directory / "other.jsonl"], tokenizer=Tokenizer.load(tiny_hf), output_prefix=directory / "other", workers=1
    )
    train = [{"prefix": str(tiny_pairs), "weight": 5}, {"prefix": str(directory / "other"), "weight": 1}]
    run_config = make_run_config(tiny_checkpoint, tiny_pairs, directory)

    def configure(normalization: str, **sections: Any) -> RunConfig:
        config: RunConfig = run_config(data={"train": train}, loss={"normalization": normalization}, **sections)
        return config

    return configure


@pytest.fixture(scope="module")
def found(make: Callable[..., RunConfig]) -> dict[tuple[str, str], Curve]:
    """Every variant's curve under every normalization."""
    variants = {"reference": (1, {}), **LAYOUT_VARIANTS, **CUT_VARIANTS}
    runs = {
        (normalization, name): Run(
            prepare_run(make(normalization, **sections), world_size=ranks), ranks, STEPS, unpacked=name == "unpacked"
        )
        for normalization in NORMALIZATIONS
        for name, (ranks, sections) in variants.items()
    }
    return curves(runs)


def assert_equal(ours: Curve, wanted: Curve) -> None:
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ours, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
        assert norm == pytest.approx(wanted_norm, rel=10 * TOLERANCE)


@pytest.mark.parametrize("name", LAYOUT_VARIANTS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_layout_gives_the_curve_of_one_process(
    normalization: str, name: str, found: dict[tuple[str, str], Curve]
) -> None:
    assert_equal(found[normalization, name], found[normalization, "reference"])


@pytest.mark.parametrize("name", CUT_VARIANTS)
@pytest.mark.parametrize("normalization", ["target_token", "target_sequence", "dataset"])
def test_micro_batches_and_packing_change_nothing(
    normalization: str, name: str, found: dict[tuple[str, str], Curve]
) -> None:
    assert_equal(found[normalization, name], found[normalization, "reference"])


@pytest.mark.parametrize("name", CUT_VARIANTS)
def test_what_bloomz_ran_depends_on_the_micro_batches(name: str, found: dict[tuple[str, str], Curve]) -> None:
    ours, wanted = (found["target_sequence_per_micro_batch", one][0][0] for one in (name, "reference"))
    assert abs(ours - wanted) > 10 * TOLERANCE * wanted


def test_normalizations_differ(found: dict[tuple[str, str], Curve]) -> None:
    first = sorted(found[normalization, "reference"][0][0] for normalization in NORMALIZATIONS)
    assert all(above - below > 10 * TOLERANCE * below for below, above in zip(first, first[1:], strict=False))


def expected_loss(normalization: str, rows: list[Row], model: BloomForCausalLM) -> float:
    """Write DESIGN's definitions out, with the token losses of each example alone."""
    sequences: list[list[torch.Tensor]] = []  # for each micro-batch, the losses of each target's tokens
    datasets: dict[int, list[torch.Tensor]] = {}
    for first in range(0, len(rows), MICRO):
        sequences.append([])
        for row in (example for packed in rows[first : first + MICRO] for example in unpack(packed)):
            tokens = torch.from_numpy(row.tokens[row.segment_ids > 0].astype(np.int64))
            targets = int(row.is_target.sum())
            with torch.no_grad():
                logits = model(tokens[None]).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits[-targets - 1 : -1], tokens[-targets:], reduction="none")
            sequences[-1].append(losses)
            datasets.setdefault(int(row.dataset_ids[0]), []).append(losses)
    whole = [losses for micro_batch in sequences for losses in micro_batch]
    if normalization == "target_token":
        return float(torch.cat(whole).mean())
    if normalization == "target_sequence":
        return float(np.mean([losses.mean() for losses in whole]))
    if normalization == "target_sequence_per_micro_batch":
        return float(np.mean([np.mean([losses.mean() for losses in micro_batch]) for micro_batch in sequences]))
    assert len(datasets) == 2, "the step must hold both datasets"
    return float(np.mean([torch.cat(losses).mean() for losses in datasets.values()]))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_first_step_is_what_transformers_gives_by_hand(
    normalization: str, tiny_hf: Path, make: Callable[..., RunConfig], found: dict[tuple[str, str], Curve]
) -> None:
    rows = open_training_rows(prepare_run(make(normalization), world_size=1))
    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).eval()
    wanted = expected_loss(normalization, [rows[number] for number in range(GLOBAL)], model)
    assert found[normalization, "reference"][0][0] == pytest.approx(wanted, rel=TOLERANCE)


def test_packing_changes_nothing_by_hand() -> None:
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
    tokens = [[float(token) for token in targets] for _, targets in examples]
    by_hand = {
        "target_token": np.mean(np.concatenate(tokens)),
        "target_sequence": np.mean([np.mean(targets) for targets in tokens]),
        "dataset": np.mean([np.mean(np.concatenate(tokens[dataset::3])) for dataset in range(3)]),
    }
    for normalization, wanted in by_hand.items():
        own_counts = counts if normalization == "dataset" else None
        for rows in (packed, alone):
            batches = [
                build_batch([row], normalization=normalization, dataset_target_tokens=own_counts) for row in rows
            ]
            weighted, units = global_batch_loss(
                [micro_batch_loss(batch, batch.labels.float())[2] for batch in batches]
            ).tolist()
            assert weighted / units == pytest.approx(float(wanted), rel=1e-6)
