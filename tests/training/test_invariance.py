"""Twenty steps at every layout give the curve of one process: losses and gradient norms, packed rows, dropout 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import LAYOUTS

STEPS = 20
TOLERANCE = 1e-5

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (ranks, {"parallel": section}) for name, (ranks, section) in LAYOUTS.items()},
    "distributed-optimizer": (1, {"parallel": {"use_distributed_optimizer": True}}),
    "micro-batch-1": (1, {"batch": {"micro_batch_size": 1, "global_batch_size": 8, "sequence_length": 64}}),
    "recompute-full": (1, {"recompute": {"granularity": "full"}}),
    "recompute-selective": (1, {"recompute": {"granularity": "selective"}}),
    "reference-attention": (1, {"kernels": {"attention": "reference"}}),
}


def rank_curve(prepared: PreparedRun) -> list[tuple[float, float]]:
    """Train in one rank and return (loss, gradient norm) of each step."""
    topology = initialize_parallel(prepared.config.parallel, seed=prepared.config.seed)
    trainer = Trainer(prepared, topology)
    metrics = [trainer.train_step() for _ in range(STEPS)]
    return [(step["loss"], step["grad_norm"]) for step in metrics]


def curve(run_config: Callable[..., RunConfig], world_size: int, sections: dict[str, Any]) -> list[tuple[float, float]]:
    prepared = prepare_run(run_config(**sections), world_size=world_size)
    curves = run_ranks(rank_curve, world_size=world_size, arguments=(prepared,))
    assert all(other == curves[0] for other in curves), "every rank reports the same numbers"
    return curves[0]


@pytest.fixture(scope="module")
def reference_curve(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import make_run_config

    make = make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("reference"))
    losses = curve(make, 1, {})
    assert losses[-1][0] < 0.9 * losses[0][0], "the model must learn for the comparison to mean something"
    return losses


@pytest.mark.parametrize("name", VARIANTS)
def test_curve_equals_one_process(
    name: str, reference_curve: list[tuple[float, float]], run_config: Callable[..., RunConfig]
) -> None:
    world_size, sections = VARIANTS[name]
    for step, (ours, wanted) in enumerate(zip(curve(run_config, world_size, sections), reference_curve, strict=True)):
        assert ours[0] == pytest.approx(wanted[0], rel=TOLERANCE), f"loss of step {step + 1}"
        assert ours[1] == pytest.approx(wanted[1], rel=10 * TOLERANCE), f"gradient norm of step {step + 1}"


@pytest.mark.parametrize("name", ["TP2", "TP2-SP"])
def test_recomputation_draws_the_same_dropout(
    name: str, tiny_hf: Path, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    model = shutil.copytree(tiny_hf, tmp_path / "dropout")
    config = json.loads((model / "config.json").read_text())
    config.update(hidden_dropout=0.1, attention_dropout=0.1)
    (model / "config.json").write_text(json.dumps(config))
    world_size, section = LAYOUTS[name]

    def curve_with(granularity: str) -> list[tuple[float, float]]:
        sections = {"model": str(model), "parallel": section, "recompute": {"granularity": granularity}}
        return curve(run_config, world_size, sections)

    assert curve_with("full") == curve_with("none")


def test_another_seed_gives_another_curve(
    reference_curve: list[tuple[float, float]], run_config: Callable[..., RunConfig]
) -> None:
    other = curve(run_config, 1, {"seed": 7})
    assert abs(other[0][0] - reference_curve[0][0]) > 100 * TOLERANCE * reference_curve[0][0]
