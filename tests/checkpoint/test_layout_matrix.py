"""Every layout reads the checkpoints of every other, optimizer state included: no verb that reshards is needed.

Four ranks, all of TP x PP x DP that four layers and heads allow; the curve goes on from each as if nothing had
happened. The control begins with the moments of a new run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.checkpoint import sharded
from megatron_xmtf.checkpoint.optimizer_shards import StateBox
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.config import RunConfig
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.prepare import prepare_run
from megatron_xmtf.training.trainer import train_rank
from tests.layouts import PP, TP

pytestmark = pytest.mark.slow

STEPS, STOP, RANKS = 6, 3, 4
TOLERANCE = 1e-5
ZERO: dict[str, Any] = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP4": {TP: 4},
    "PP4": {PP: 4},
    "DP4": {},
    "DP4-ZeRO": ZERO,
    "TP2-PP2": {TP: 2, PP: 2},
    "TP2-SP-DP2-ZeRO": {TP: 2, "sequence_parallel": True, **ZERO},
    "PP2-DP2": {PP: 2},
    "PP2-VPP2-DP2-ZeRO": {PP: 2, "virtual_pipeline_model_parallel_size": 2, **ZERO},
}


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    from tests.conftest import make_run_config

    return make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def runs(make: Callable[..., RunConfig]) -> dict[str, RunConfig]:
    """An uninterrupted run at each layout that leaves a checkpoint at step 3."""
    found = {}
    for name, section in LAYOUTS.items():
        found[name] = make(parallel=section, schedule={"train_steps": STEPS}, checkpoint={"save_interval": STOP})
        train(found[name])
    return found


def train(config: RunConfig) -> None:
    run_ranks(train_rank, world_size=RANKS, arguments=(prepare_run(config, world_size=RANKS),))


def curve(run: str | Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines]


def resumed(saved: RunConfig, output: Path, make: Callable[..., RunConfig], section: dict[str, Any]) -> RunConfig:
    shutil.copytree(saved.output, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:07d}")
    return make(output=str(output), parallel=section, schedule={"train_steps": STEPS})


@pytest.mark.parametrize("saver", LAYOUTS)
def test_every_layout_goes_on_from_it(
    saver: str, runs: dict[str, RunConfig], make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    reference = curve(runs["TP2-PP2"].output)
    assert len(reference) == STEPS
    for loader, section in LAYOUTS.items():
        config = resumed(runs[saver], tmp_path / loader, make, section)
        train(config)
        found = curve(config.output)
        assert len(found) == STEPS, loader
        for step, (ours, wanted) in enumerate(zip(found, reference, strict=True), 1):
            assert ours[0] == pytest.approx(wanted[0], rel=TOLERANCE), f"{saver} to {loader}: loss of step {step}"
            assert ours[1] == pytest.approx(wanted[1], rel=10 * TOLERANCE), f"{saver} to {loader}: norm of step {step}"
        shutil.rmtree(config.output)


def test_a_load_that_leaves_the_moments_out_is_seen(
    runs: dict[str, RunConfig], make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(reader: CheckpointReader, boxes: Sequence[StateBox]) -> None:
        for box in boxes:
            box.data.zero_()

    monkeypatch.setattr(sharded, "read_boxes", forget)  # the ranks are forks of this process
    config = resumed(runs["DP4-ZeRO"], tmp_path / "without", make, ZERO)
    train(config)
    found, wanted = curve(config.output), curve(runs["DP4-ZeRO"].output)
    assert found[STOP][0] == pytest.approx(wanted[STOP][0], rel=TOLERANCE), "the weights are the same"
    assert abs(found[-1][0] - wanted[-1][0]) > 100 * TOLERANCE * wanted[-1][0]
