"""bf16 and fp16 follow fp32 within what rounding explains; main parameters and accumulated gradients are fp32.

The bound of a loss curve: a number of p bits of significand is rounded by at most u = 2^-p of itself, 2^-8 in bf16 and
2^-11 in fp16. On its way to a logit a value is rounded R times, each on its own, so a logit is off by
u * sqrt(R) * spread, where spread is the standard deviation of the logits. The loss of a target is off by about as
much, with a random sign, and a step's loss is the mean over N targets:

    bound = 3 * u * sqrt(R) * spread / sqrt(N)       three standard deviations

It holds over a run only if rounding does not add up in the weights, and that is what fp32 main parameters are for: the
controls keep them in half precision, or start them on its grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.utils import unwrap_model
from transformers import BloomForCausalLM

from megatron_xmtf.config import RunConfig
from megatron_xmtf.models.norm import LayerNorm
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training import trainer as trainer_module
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.conftest import make_run_config
from tests.layouts import LAYOUTS

STEPS = 20
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDINGS = 4 * 12 + 4
"""Of a layer: two norms, four products, biases and GELU, probabilities, context, two residual sums; of the rest the
embedding, its norm, the last norm, the logits."""
RATE = {"lr": 2e-5}
"""BLOOMZ's; at weights of 0.15 it is 1/24 of half a step of bf16 and 1/3 of one of fp16."""
Curve = list[tuple[float, float, int]]


def rank_curve(prepared: PreparedRun, fault: str | None) -> Curve:
    """Train in one rank; return loss, gradient norm and number of targets of each step."""
    torch.set_num_threads(1)  # a rank that is alone takes all cores, and in half precision waits for them
    topology = initialize_parallel(prepared.config.parallel, seed=prepared.config.seed)
    if fault == "main parameters start on the grid":
        trainer_module.load_main_parameters = lambda *arguments: {}
    trainer = Trainer(prepared, topology)
    curve = []
    for _ in range(STEPS):
        metrics = trainer.train_step()
        assert not metrics["skipped"]
        curve.append((metrics["loss"], metrics["grad_norm"], metrics["examples"]))
        if fault == "main parameters in half precision":
            for parameter in trainer.chunks[0].parameters():
                parameter.main_param.data.copy_(parameter.main_param.to(parameter.dtype))
    return curve


def train(make: Callable[..., RunConfig], layout: str, precision: str, fault: str | None = None) -> Curve:
    ranks, parallel = (1, {}) if layout == "TP1" else LAYOUTS[layout]
    prepared = prepare_run(make(parallel=parallel, precision=precision, optimizer=RATE), world_size=ranks)
    curves = run_ranks(rank_curve, world_size=ranks, arguments=(prepared, fault))
    assert all(curve == curves[0] for curve in curves), "every rank reports the same numbers"
    return curves[0]


def furthest(curve: Curve, reference: Curve) -> float:
    return max(abs(ours[0] - wanted[0]) for ours, wanted in zip(curve, reference, strict=True))


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    return make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def fp32_curve(make: Callable[..., RunConfig]) -> Curve:
    return train(make, "TP1", "fp32")


@pytest.fixture(scope="module")
def spread(tiny_hf: Path) -> float:
    """Standard deviation of the logits, by `transformers` in fp32."""
    tokens = torch.randint(4, 260, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32)(tokens).logits
    return float(logits.std())


def bound(precision: str, spread: float, curve: Curve) -> float:
    """Return the bound of the head of this file, for the step with the fewest targets."""
    return 3 * UNIT[precision] * math.sqrt(ROUNDINGS) * spread / math.sqrt(min(targets for _, _, targets in curve))


@pytest.fixture(scope="module")
def own_curves(make: Callable[..., RunConfig]) -> dict[str, Curve]:
    """The curve of one process in each half precision."""
    return {precision: train(make, "TP1", precision) for precision in UNIT}


@pytest.mark.parametrize("precision", UNIT)
def test_half_precision_follows_fp32(
    precision: str, fp32_curve: Curve, own_curves: dict[str, Curve], spread: float
) -> None:
    allowed = bound(precision, spread, fp32_curve)
    assert fp32_curve[0][0] - fp32_curve[-1][0] > 5 * allowed, "the run must move by more than it is allowed to miss"
    assert furthest(own_curves[precision], fp32_curve) <= allowed
    # A norm is a sum over tens of thousands of gradients: their roundings average out, they stay within 2 u.
    for (_, ours, _), (_, wanted, _) in zip(own_curves[precision], fp32_curve, strict=True):
        assert ours == pytest.approx(wanted, rel=2 * UNIT[precision])


@pytest.mark.parametrize(
    ("precision", "layout"),
    [("bf16", "TP2"), ("bf16", "PP2"), ("bf16", "DP2-distributed-optimizer"), ("fp16", "TP2-PP2")],
)
def test_layouts_follow_one_another(
    precision: str,
    layout: str,
    make: Callable[..., RunConfig],
    fp32_curve: Curve,
    own_curves: dict[str, Curve],
    spread: float,
) -> None:
    curve, allowed = train(make, layout, precision), bound(precision, spread, fp32_curve)
    assert furthest(curve, fp32_curve) <= allowed
    assert furthest(curve, own_curves[precision]) <= allowed, "another order of sums rounds otherwise, by no more"


@pytest.mark.parametrize(
    ("precision", "fault"),
    [
        ("bf16", "main parameters in half precision"),
        ("bf16", "main parameters start on the grid"),
        ("fp16", "main parameters start on the grid"),
    ],
)
def test_a_fault_breaks_the_bound(
    precision: str, fault: str, make: Callable[..., RunConfig], fp32_curve: Curve, spread: float
) -> None:
    assert furthest(train(make, "TP1", precision, fault), fp32_curve) > 2 * bound(precision, spread, fp32_curve)


def rank_main_parameters(prepared: PreparedRun) -> list[tuple[str, float, float, int]]:
    """Return name, furthest a main parameter is from the checkpoint, and its weight, and how many of it are here."""
    from megatron_xmtf.checkpoint.sharded import load_model_weights
    from megatron_xmtf.models.registry import build_model

    torch.set_num_threads(1)
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    stored = build_model(prepared.architecture, parallel=prepared.config.parallel, precision="fp32")
    load_model_weights(stored, prepared.start.checkpoint)
    found = []
    for chunk, wide in zip(trainer.chunks, stored, strict=True):
        exact = dict(unwrap_model(wide).named_parameters())
        for name, parameter in unwrap_model(chunk).named_parameters():
            assert parameter.dtype == torch.bfloat16 and parameter.main_grad.dtype == torch.float32
            main, flat = parameter.main_param, exact[name].detach().flatten()
            if main is None:
                continue
            assert main.dtype == torch.float32
            if main.numel() != flat.numel():  # the part that the distributed optimizer updates here
                [part] = trainer.optimizer.chained_optimizers
                span = part._get_model_param_range_map(parameter)["param"]
                flat = flat[span.start : span.end]
            rounded = (flat.bfloat16().float() - flat).abs().max()
            found.append((name, float((main.flatten() - flat).abs().max()), float(rounded), main.numel()))
    return found


@pytest.mark.parametrize("layout", ["TP2-PP2", "PP2-VPP2", "DP2-distributed-optimizer"])
def test_main_parameters_start_from_the_checkpoint(layout: str, run_config: Callable[..., RunConfig]) -> None:
    ranks, parallel = LAYOUTS[layout]
    prepared = prepare_run(run_config(parallel=parallel, precision="bf16"), world_size=ranks)
    ranks_found = run_ranks(rank_main_parameters, world_size=ranks, arguments=(prepared,))
    assert all(error == 0.0 for found in ranks_found for _, error, _, _ in found)
    assert all(any(rounded > 1e-4 for _, _, rounded, _ in found) for found in ranks_found), "bf16 would have lost some"
    if "distributed" in layout:
        counts = [sum(count for *_, count in found) for found in ranks_found]
        assert sum(counts) == 384 * 64 + 4 * (12 * 64 * 64 + 13 * 64) + 4 * 64, "each number has one owner"


def rank_small_update(prepared: PreparedRun) -> tuple[float, float, float]:
    """Take 8 steps of 1/8 of half a step of bf16 at a weight of 1.0; return it, its main parameter, one step before."""
    torch.set_num_threads(1)
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    parameter = dict(unwrap_model(trainer.chunks[0]).named_parameters())["decoder.final_layernorm.weight"]
    with torch.no_grad():
        parameter.main_param.fill_(1.0)
        parameter.data.fill_(1.0)
    before = 0.0
    for _ in range(9):
        before = float(parameter[0])
        parameter.main_grad.fill_(-1.0)
        trainer.optimizer.step()
    return float(parameter[0]), float(parameter.main_param[0]), before


def test_an_update_below_the_step_of_bf16_is_not_lost(run_config: Callable[..., RunConfig]) -> None:
    # From 1.0 upwards bf16 has steps of 2^-7; Adam's first updates of a constant gradient are the rate each.
    rate = 2.0**-8 / 8
    config = run_config(precision="bf16", optimizer={"lr": rate, "clip_grad": 0.0, "weight_decay": 0.0})
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"lr_decay_style": "constant"})})
    [(weight, main, before)] = run_ranks(
        rank_small_update, world_size=1, arguments=(prepare_run(config, world_size=1),)
    )
    assert main == pytest.approx(1.0 + 9 * rate, rel=1e-6)
    assert (before, weight) == (1.0, 1.0 + 2.0**-7), "the ninth update passes the half step"
    alone = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(9):
        alone = alone + rate
    assert float(alone) == 1.0, "without a main parameter all nine are lost"


MICRO_BATCHES = 64
SMALL = 2.0**-11
"""Weight of all micro-batches but the first: an eighth of half a step of bf16 beside it."""


def rank_accumulation(prepared: PreparedRun, fp32_sums: bool) -> list[float]:
    """Accumulate a large and 63 small gradients; return how far each parameter's sum is from the sum in fp64."""
    from dataclasses import replace

    if not fp32_sums:
        plain = trainer_module.DistributedDataParallelConfig
        trainer_module.DistributedDataParallelConfig = lambda **keys: plain(**{**keys, "grad_reduce_in_fp32": False})
    torch.set_num_threads(1)
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    first = trainer.loader.micro_batches(0)[0]
    # The same rows each time, so that every small addend is one and the same power of two of the first.
    small = replace(first, loss_weights=first.loss_weights * SMALL)
    model = unwrap_model(trainer.chunks[0])
    alone = []
    for batch in (first, small):
        trainer.forward_backward([batch])
        alone.append([parameter.main_grad.double() * batch.num_loss_units for parameter in model.parameters()])
    trainer.forward_backward([first] + [small] * (MICRO_BATCHES - 1))
    errors = []
    for parameter, large, little in zip(model.parameters(), *alone, strict=True):
        wanted = (large + (MICRO_BATCHES - 1) * little) / (first.num_loss_units * MICRO_BATCHES)
        errors.append(float((parameter.main_grad.double() - wanted).abs().max() / wanted.abs().max()))
    return errors


@pytest.mark.parametrize("fp32_sums", [True, False])
def test_small_gradients_are_not_lost_beside_a_large_one(fp32_sums: bool, run_config: Callable[..., RunConfig]) -> None:
    config = run_config(precision="bf16", batch={"micro_batch_size": 1, "global_batch_size": 8, "sequence_length": 64})
    prepared = prepare_run(config, world_size=1)
    [errors] = run_ranks(rank_accumulation, world_size=1, arguments=(prepared, fp32_sums))
    if fp32_sums:
        # Each of the sums and the division round once: 2^-24 each, and they add up over the micro-batches at worst.
        assert max(errors) <= (MICRO_BATCHES + 2) * 2.0**-24
    else:
        # All that is small is lost: 63 * 2^-11 of 1 + 63 * 2^-11, that is 0.0298.
        assert min(errors) > 0.02


@pytest.mark.parametrize("precision", UNIT)
def test_norms_compute_in_fp32(precision: str) -> None:
    class Settings:
        params_dtype = DTYPE[precision]
        sequence_parallel = False

    generator = torch.Generator().manual_seed(0)
    # Far from zero: the variance would drown in half precision.
    hidden = (30.0 + torch.randn(64, 96, generator=generator)).to(DTYPE[precision])
    norm = LayerNorm(Settings(), 96)  # type: ignore[arg-type]
    found = norm(hidden)
    wide = hidden.double()
    centred = wide - wide.mean(dim=1, keepdim=True)
    wanted = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    assert found.dtype == DTYPE[precision]
    # One rounding of the result, and the eps of fp32 sums.
    assert ((found.double() - wanted).abs() <= UNIT[precision] * wanted.abs() + 1e-4).all()
    half = hidden - hidden.mean(dim=1, keepdim=True)
    half = half / (half.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    assert ((half.double() - wanted).abs() > UNIT[precision] * wanted.abs() + 1e-4).any(), "computed in half precision"
