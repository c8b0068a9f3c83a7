"""GroupStepAdam is AdamW, also after a resume; torch's own AdamW inside Megatron-Core is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.group_step_adam import GroupStepAdam, ReferenceAdam
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from tests.layouts import LAYOUTS

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def parameter_groups() -> list[dict[str, Any]]:
    """Return a decayed and an undecayed group of random parameters, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector, scalar = (
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,), ())
    )
    return [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector, scalar], "weight_decay": 0.0}]


def run(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """Update with gradients that depend on the step alone; return the parameters."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 3)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] / (1 + step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_equals_adamw_of_torch_bit_by_bit() -> None:
    expected = run(torch.optim.AdamW(parameter_groups(), fused=True, **SETTINGS), range(8))
    assert_same(run(GroupStepAdam(parameter_groups(), **SETTINGS), range(8)), expected)


def test_the_reference_equals_torch_s_loop_bit_by_bit() -> None:
    expected = run(torch.optim.AdamW(parameter_groups(), foreach=False, fused=False, **SETTINGS), range(8))
    assert_same(run(ReferenceAdam(parameter_groups(), **SETTINGS), range(8)), expected)


@pytest.mark.parametrize("adam", [GroupStepAdam, ReferenceAdam])
def test_equals_adamw_written_out(adam: type[GroupStepAdam]) -> None:
    found = run(adam(parameter_groups(), **SETTINGS), range(5))
    groups = parameter_groups()
    values = [(p.detach().double(), group["weight_decay"]) for group in groups for p in group["params"]]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value, _ in values]
    beta1, beta2 = SETTINGS["betas"]
    for step in range(5):
        generator = torch.Generator().manual_seed(1000 + step)
        rate = SETTINGS["lr"] / (1 + step)
        for i, (value, decay) in enumerate(values):
            gradient = torch.randn(value.shape, generator=generator).double() * 10.0 ** (step % 3)
            mean = beta1 * moments[i][0] + (1 - beta1) * gradient
            square = beta2 * moments[i][1] + (1 - beta2) * gradient**2
            moments[i] = mean, square
            corrected = mean / (1 - beta1 ** (step + 1)), square / (1 - beta2 ** (step + 1))
            value = value * (1 - rate * decay)
            values[i] = value - rate * corrected[0] / (corrected[1].sqrt() + SETTINGS["eps"]), decay
    for ours, (expected, _) in zip(found, values, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_goes_on_the_same_after_its_state_was_saved_and_loaded() -> None:
    expected = run(torch.optim.AdamW(parameter_groups(), fused=True, **SETTINGS), range(8))
    first = GroupStepAdam(parameter_groups(), **SETTINGS)
    weights = run(first, range(4))
    state = copy.deepcopy(first.state_dict())
    assert [group["step"] for group in state["param_groups"]] == [4, 4]
    assert all(set(values) == {"exp_avg", "exp_avg_sq"} for values in state["state"].values())
    second = GroupStepAdam(parameter_groups(), **SETTINGS)
    with torch.no_grad():
        params = [parameter for group in second.param_groups for parameter in group["params"]]
        for parameter, weight in zip(params, weights, strict=True):
            parameter.copy_(weight)
    second.load_state_dict(state)
    assert_same(run(second, range(4, 8)), expected)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    groups = parameter_groups()
    before = [parameter.detach().clone() for group in groups for parameter in group["params"]]
    optimizer = GroupStepAdam(groups, **SETTINGS)
    optimizer.step()
    assert_same([parameter for group in groups for parameter in group["params"]], before)
    assert not optimizer.state


def weights_after_a_reload(stock: bool, reload: bool) -> tuple[int, int, list[list[float]]]:
    """Train with Megatron-Core's distributed optimizer, load its own state in between, train on.

    Returns: number of parameters of the inner Adam, number of different step counters, some of the weights.
    """
    from megatron_xmtf.parallel.topology import initialize_parallel
    from megatron_xmtf.training import optimizer as module
    from tests.parallel.tiny_engine import build_engine, run_config, tiny_batches

    if stock:
        module._install_group_step_adam = lambda: None
    config = run_config(use_distributed_optimizer=True)
    initialize_parallel(config.parallel, seed=1)
    engine = build_engine(config)
    batches = tiny_batches(4)
    for step in range(2):
        engine.train_step(batches[step : step + 1])
    part = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])[0]
    if reload:
        with torch.no_grad():
            part.load_state_dict(copy.deepcopy(part.state_dict()))
    for step in range(2, 4):
        engine.train_step(batches[step : step + 1])
    inner = part.optimizer
    params = [parameter for group in inner.param_groups for parameter in group["params"]]
    counters = {id(inner.state[parameter].get("step")) for parameter in params}
    weights = [parameter.detach().flatten()[:50].tolist() for parameter in engine.chunks[0].parameters()]
    return len(params), len(counters), weights


@pytest.mark.parametrize("stock", [True, False])
def test_a_shared_step_count_trains_on_wrongly_without_an_error(stock: bool) -> None:
    [(count, _, expected)] = run_ranks(weights_after_a_reload, world_size=1, arguments=(stock, False))
    [(_, counters, found)] = run_ranks(weights_after_a_reload, world_size=1, arguments=(stock, True))
    if stock:
        assert count > 10 and counters == 1, "every parameter counts one and the same tensor up"
        difference = max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
        assert difference > 1e-4
    else:
        assert found == expected


def both_adams() -> tuple[list[list[float]], list[list[float]]]:
    """Train four steps with the stock Adam and with ours, in one rank each after the other."""
    from megatron.core import optimizer as mcore_optimizer

    from megatron_xmtf.parallel.topology import initialize_parallel
    from megatron_xmtf.training import optimizer as module
    from tests.parallel.tiny_engine import build_engine, run_config, tiny_batches

    config = run_config()
    initialize_parallel(config.parallel, seed=1)
    install, found = module._install_group_step_adam, []
    for installer in (lambda: None, install):
        module._install_group_step_adam = installer
        engine = build_engine(config)
        for batch in tiny_batches(4):
            engine.train_step([batch])
        # The key's bias has no gradient but rounding noise, which Adam blows up to full steps.
        named = [(n, p) for n, p in engine.chunks[0].named_parameters() if not n.endswith("linear_qkv.bias")]
        found.append([parameter.detach().flatten()[:50].tolist() for _, parameter in named])
    assert mcore_optimizer.Adam is GroupStepAdam
    return found[0], found[1]


def test_trains_a_model_like_the_stock_adam() -> None:
    [(stock, ours)] = run_ranks(both_adams, world_size=1)
    for theirs, values in zip(stock, ours, strict=True):
        assert values == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def decayed_parameters(sharded: bool) -> dict[float, int]:
    """Return weight decay -> how many numbers it falls on."""
    from megatron_xmtf.parallel.topology import initialize_parallel
    from tests.parallel.tiny_engine import build_engine, run_config

    config = run_config(use_distributed_optimizer=sharded)
    initialize_parallel(config.parallel, seed=1)
    groups = build_engine(config).optimizer.param_groups
    return {group["weight_decay"]: sum(parameter.numel() for parameter in group["params"]) for group in groups}


@pytest.mark.parametrize("sharded", [False, True])
def test_matrices_are_decayed_and_norms_and_biases_are_not(sharded: bool) -> None:
    # Hidden size 64, 4 layers, 384 rows of vocabulary.
    matrices = 384 * 64 + 4 * 12 * 64 * 64
    layer_vectors = 4 * 64 + 3 * 64 + 64 + 4 * 64 + 64  # two norms; biases of QKV, projection, fc1, fc2
    vectors = 2 * 64 + 4 * layer_vectors + 2 * 64
    assert run_ranks(decayed_parameters, world_size=1, arguments=(sharded,)) == [{1e-4: matrices, 0.0: vectors}]


def rank_decays(prepared: PreparedRun) -> dict[str, set[float]]:
    """Return the decays that fall on each parameter of this rank, by name."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_xmtf.parallel.topology import initialize_parallel
    from megatron_xmtf.training.trainer import Trainer

    trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    [part] = trainer.optimizer.chained_optimizers
    groups = part.optimizer.param_groups
    found: dict[str, set[float]] = {}
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            if isinstance(part, DistributedOptimizer):
                if parameter in part.model_param_group_index_map:  # else it is updated on the other rank
                    found.setdefault(name, set()).add(
                        groups[part.model_param_group_index_map[parameter][0]]["weight_decay"]
                    )
                continue
            main = getattr(parameter, "main_param", parameter)
            decays = {group["weight_decay"] for group in groups if any(main is held for held in group["params"])}
            found.setdefault(name, set()).update(decays)
    return found


@pytest.mark.parametrize(
    ("layout", "precision"), [("TP2-PP2", "fp32"), ("TP2-PP2", "bf16"), ("DP2-distributed-optimizer", "bf16")]
)
def test_decay_by_name_at_every_layout(layout: str, precision: str, run_config: Callable[..., RunConfig]) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = run_config(parallel=parallel, precision=precision, optimizer={"lr": 1e-3, "weight_decay": 0.1})
    found = run_ranks(rank_decays, world_size=ranks, arguments=(prepare_run(config, world_size=ranks),))
    decays = {name: decay for names in found for name, decay in names.items()}
    assert len(decays) > 20
    for name, decay in decays.items():
        is_vector = name.endswith(".bias") or "layernorm" in name
        assert decay == ({0.0} if is_vector else {0.1}), name
