"""Twenty steps at every layout give the curve of one process: losses and gradient norms, packed rows, dropout 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.training.prepare import prepare_run
from tests.layouts import LAYOUTS, PP, TP
from tests.training.curves import Curve, Run, curves

STEPS = 20
TOLERANCE = 1e-5
VPP = "virtual_pipeline_model_parallel_size"
ZERO1: dict[str, Any] = {"use_distributed_optimizer": True}
OVERLAP_GRADIENTS: dict[str, Any] = {"overlap_grad_reduce": True}
OVERLAP: dict[str, Any] = {**ZERO1, **OVERLAP_GRADIENTS, "overlap_param_gather": True}
SEQUENCE: dict[str, Any] = {TP: 2, "sequence_parallel": True}
FULL: dict[str, Any] = {"granularity": "full"}

PARALLEL: dict[str, tuple[int, dict[str, Any]]] = {
    **LAYOUTS,
    "one-process-distributed-optimizer": (1, ZERO1),
    "DP2-overlap-gradients": (2, OVERLAP_GRADIENTS),
    "DP2-distributed-optimizer-overlap-gradients": (2, {**ZERO1, **OVERLAP_GRADIENTS}),
    "PP2-DP2": (4, {PP: 2}),
    "PP2-DP2-distributed-optimizer": (4, {PP: 2, **ZERO1}),
    "PP2-DP2-overlap": (4, {PP: 2, **OVERLAP}),
    "TP2-DP2-overlap": (4, {TP: 2, **OVERLAP}),
    "PP2-VPP2-DP2-overlap": (4, {PP: 2, VPP: 2, **OVERLAP}),
    "PP2-uneven-3-1": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 3}),
}


def batch(micro_batch_size: int, **more: Any) -> dict[str, Any]:
    return {"batch": {"micro_batch_size": micro_batch_size, "global_batch_size": 8, "sequence_length": 64, **more}}


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (ranks, {"parallel": section}) for name, (ranks, section) in PARALLEL.items()},
    "micro-batch-1": (1, batch(1)),
    "micro-batch-4": (1, batch(4)),
    "micro-batch-1-PP2-VPP2": (2, {**batch(1), "parallel": {PP: 2, VPP: 2}}),
    "recompute-selective": (1, {"recompute": {"granularity": "selective"}}),
    "recompute-full-uniform": (1, {"recompute": {**FULL, "method": "uniform", "num_layers": 1}}),
    "recompute-full-uniform-2": (1, {"recompute": {**FULL, "method": "uniform", "num_layers": 2}}),
    "recompute-full-block-3": (1, {"recompute": {**FULL, "method": "block", "num_layers": 3}}),
    "recompute-selective-TP2-SP": (2, {"parallel": SEQUENCE, "recompute": {"granularity": "selective"}}),
    "recompute-full-TP2-SP": (2, {"parallel": SEQUENCE, "recompute": FULL}),
    "recompute-full-block-1-PP2": (
        2,
        {"parallel": {PP: 2}, "recompute": {**FULL, "method": "block", "num_layers": 1}},
    ),
    "reference-attention": (1, {"kernels": {"attention": "reference"}}),
    "unpacked": (1, {}),
}

RAMP = {"rampup_batch_size": {"start": 4, "increment": 4, "rows": 64}}
"""Steps of 4 rows, then of 8 from row 64 on: both sizes are in 20 steps."""

RAMPED: dict[str, tuple[int, dict[str, Any]]] = {
    "ramp-micro-batch-1": (1, batch(1, **RAMP)),
    "ramp-DP2-overlap": (2, {**batch(2, **RAMP), "parallel": OVERLAP}),
    "ramp-PP2-VPP2": (2, {**batch(2, **RAMP), "parallel": {PP: 2, VPP: 2}}),
}

MORE = {
    "DP2-overlap-gradients",
    "DP2-distributed-optimizer-overlap-gradients",
    "PP2-DP2",
    "PP2-DP2-distributed-optimizer",
    "PP2-uneven-3-1",
    "TP2-DP2-overlap",
    "micro-batch-1-PP2-VPP2",
    "recompute-full-uniform-2",
    "recompute-selective-TP2-SP",
    "ramp-DP2-overlap",
}
"""Left to `make drill`: they join two things that other variants show."""

REFERENCES: dict[str, dict[str, Any]] = {
    "reference": {},
    "another-seed": {"seed": 7},
    "ramp-reference": batch(2, **RAMP),
}
GROUPS: dict[tuple[int, bool], dict[str, dict[str, Any]]] = {(1, False): REFERENCES}
"""(ranks, left to the drill) -> runs that are trained together, by name."""
for variant, (variant_ranks, variant_sections) in {**VARIANTS, **RAMPED}.items():
    GROUPS.setdefault((variant_ranks, variant in MORE), {})[variant] = variant_sections


@pytest.fixture(scope="module")
def curve_of(
    tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Curve]:
    """Return the curve of a run by name; the first of a group trains all of it."""
    from tests.conftest import make_run_config

    make = make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("invariance"))
    found: dict[str, Curve] = {}

    def curve(name: str) -> Curve:
        if name not in found:
            (key,) = (key for key, group in GROUPS.items() if name in group)
            ranks = key[0]
            runs = {
                one: Run(prepare_run(make(**sections), world_size=ranks), ranks, STEPS, unpacked=one == "unpacked")
                for one, sections in GROUPS[key].items()
            }
            found.update(curves(runs))
        return found[name]

    return curve


def assert_equal(found: Curve, wanted: Curve) -> None:
    assert len(found) == len(wanted) == STEPS
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE), f"loss of step {step}"
        assert ours[1] == pytest.approx(theirs[1], rel=10 * TOLERANCE), f"gradient norm of step {step}"


def names(variants: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in MORE else []) for name in variants]


@pytest.mark.parametrize("name", names(VARIANTS))
def test_curve_equals_one_process(name: str, curve_of: Callable[[str], Curve]) -> None:
    reference = curve_of("reference")
    assert reference[-1][0] < 0.9 * reference[0][0], "the model must learn for the comparison to mean something"
    assert_equal(curve_of(name), reference)


@pytest.mark.parametrize("name", names(RAMPED))
def test_a_batch_size_ramp_is_the_same_at_every_layout(name: str, curve_of: Callable[[str], Curve]) -> None:
    reference = curve_of("ramp-reference")
    assert reference[0] != curve_of("reference")[0], "the first step has fewer rows"
    assert_equal(curve_of(name), reference)


def test_another_seed_gives_another_curve(curve_of: Callable[[str], Curve]) -> None:
    other, reference = curve_of("another-seed"), curve_of("reference")
    assert abs(other[0][0] - reference[0][0]) > 100 * TOLERANCE * reference[0][0]
