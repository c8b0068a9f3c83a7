"""Adafactor gives the updates of `transformers.Adafactor` at any layout, and goes on after a resume at another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Adafactor as ReferenceAdafactor
from transformers import BloomForCausalLM

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.adafactor import Adafactor
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import LAYOUTS
from tests.training.gradients import assemble, hf_name, relative_difference

STEPS = 6
TOLERANCE = 1e-5
"""max|difference| / max|reference| of a weight after six steps: some roundings of fp32 (6e-8) of sums in another order
pass through a square root and six updates. Measured: under 1e-6."""
RATE = 3e-2
"""So large that six steps change weights by a good part of themselves; they are compared, not trained on."""

SHAPES = ((7, 5), (5,), (3, 8))


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradient(shape: torch.Size | tuple[int, ...], name: str, step: int) -> torch.Tensor:
    """Return a gradient that depends on name and step alone; its size differs by step, as do its rows'."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    values = torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 2)
    values *= torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.01
    return values


def run(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """Update with the gradients of some steps; return the parameters."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        for number, parameter in enumerate(params):
            parameter.grad = gradient(parameter.shape, f"p{number}", step)
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def reference(params: Any, **settings: Any) -> torch.optim.Optimizer:
    values = {"scale_parameter": True, "relative_step": False, "warmup_init": False, "weight_decay": 0.0, **settings}
    return ReferenceAdafactor(params, lr=RATE, **values)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"multiply_by_parameter_scale": False}, {"scale_parameter": False}),
        ({"decay_rate": 0.5, "clipping_threshold": 0.3}, {"decay_rate": -0.5, "clip_threshold": 0.3}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"epsilon1": 1e-3, "epsilon2": 2.0}, {"eps": (1e-3, 2.0)}),
    ],
    ids=["t5x", "absolute-rate", "decay-and-clipping", "weight-decay", "epsilons"],
)
def test_equals_transformers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    expected = run(reference(parameters(), **theirs), range(8))
    found = run(Adafactor(parameters(), lr=RATE, **ours), range(8))
    for value, wanted, start in zip(found, expected, parameters(), strict=True):
        assert relative_difference(value - start.detach(), wanted - start.detach()) <= TOLERANCE


def test_equals_the_paper_written_out() -> None:
    [weight, *_] = params = parameters()
    value = weight.detach().double()
    row, column = torch.zeros(7).double(), torch.zeros(5).double()
    for step in range(4):
        g = gradient(weight.shape, "p0", step).double()
        beta = 1 - (step + 1) ** -0.8
        row = beta * row + (1 - beta) * (g**2 + 1e-30).mean(1)
        column = beta * column + (1 - beta) * (g**2 + 1e-30).mean(0)
        update = g / (torch.outer(row, column) / row.mean()).sqrt()
        update /= max(1.0, float(update.square().mean().sqrt()))
        value = value - RATE / (1 + step) * max(1e-3, float(value.square().mean().sqrt())) * update
    run(Adafactor(params, lr=RATE), range(4))
    torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_goes_on_the_same_after_its_state_was_saved_and_loaded() -> None:
    expected = run(Adafactor(parameters(), lr=RATE), range(8))
    first = Adafactor(parameters(), lr=RATE)
    weights = run(first, range(4))
    state = copy.deepcopy(first.state_dict())
    assert [set(values) for values in state["state"].values()] == [
        {"exp_avg_sq_row", "exp_avg_sq_col"},
        {"exp_avg_sq"},
        {"exp_avg_sq_row", "exp_avg_sq_col"},
    ]
    second = Adafactor([torch.nn.Parameter(weight) for weight in weights], lr=RATE)
    second.load_state_dict(state)
    for found, wanted in zip(run(second, range(4, 8)), expected, strict=True):
        assert torch.equal(found, wanted)


# The model in parallel


Shard = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def adafactor_steps(trainer: Trainer, steps: range) -> list[Shard]:
    """Update a trainer's model with the gradients of `gradient`; return name, shape, offset, weight of each part."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.utils import unwrap_model

    from megatron_xmtf.training.optimizer import set_learning_rate

    vocab_size = trainer.prepared.architecture.vocab_size
    held: list[ShardedTensor] = []
    for chunk in trainer.chunks:
        state = unwrap_model(chunk).sharded_state_dict(metadata={"non_homogeneous_layers": True})
        held += [value for value in state.values() if isinstance(value, ShardedTensor)]
    for step in steps:
        for value in held:
            shape = tuple(value.global_shape)
            whole = torch.zeros(shape)
            rows = vocab_size if "word_embeddings" in value.key else shape[0]
            whole[:rows] = gradient((rows, *shape[1:]), value.key, step)
            scale = float(trainer.optimizer.get_loss_scale())
            value.data.main_grad.copy_(whole[value.global_slice()] * scale)
        set_learning_rate(trainer.optimizer, RATE / (1 + step))
        updated, _, _ = trainer.optimizer.step()
        assert updated
    return [
        (
            value.key,
            tuple(value.global_shape),
            tuple(value.global_offset),
            getattr(value.data, "main_param", value.data).detach().float().clone(),
        )
        for value in held
    ]


def rank_weights(prepared: PreparedRun) -> list[Shard]:
    """Update in one rank; faults that a test has patched in are there too, ranks are forked."""
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    return adafactor_steps(Trainer(prepared, topology), range(STEPS))


def whole_weights(run_config: Callable[..., RunConfig], name: str, **sections: Any) -> dict[str, torch.Tensor]:
    world_size, parallel = (1, {}) if name == "TP1" else LAYOUTS[name]
    config = run_config(parallel=parallel, **{"optimizer": {"name": "adafactor"}, **sections})
    prepared = prepare_run(config, world_size=world_size)
    return assemble(run_ranks(rank_weights, world_size=world_size, arguments=(prepared,)))


def expected_weights(tiny_hf: Path, *, steps: int = STEPS) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of BloomForCausalLM before and after the same steps of `transformers.Adafactor`."""
    model = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32)
    named = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = reference(named.values())
    for step in range(steps):
        for name, parameter in named.items():
            parameter.grad = gradient(tuple(parameter.shape), our_name(name), step)
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        optimizer.step()
    return before, {name: parameter.detach() for name, parameter in named.items()}


def our_name(theirs: str) -> str:
    [name] = [name for name in OUR_NAMES if hf_name(name) == theirs]
    return name


LAYER_NAMES = [
    f"{module}.{kind}"
    for module in (
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    for kind in ("weight", "bias")
]
OUR_NAMES = [
    "embedding.word_embeddings.weight",
    *[f"embedding.layernorm.{kind}" for kind in ("weight", "bias")],
    *[f"decoder.final_layernorm.{kind}" for kind in ("weight", "bias")],
    *[f"decoder.layers.{layer}.{name}" for layer in range(4) for name in LAYER_NAMES],
]


def worst_update(found: dict[str, torch.Tensor], tiny_hf: Path) -> tuple[float, str]:
    """Return the largest relative difference of a tensor's change over all steps, and its name."""
    before, after = expected_weights(tiny_hf)
    assert {hf_name(name) for name in found} == set(after)
    differences = []
    for name, value in found.items():
        start, wanted = before[hf_name(name)], after[hf_name(name)]
        if name == "embedding.word_embeddings.weight":
            assert len(value) > len(wanted), "the vocabulary's padding must be in play"
            value = value[: len(wanted)]
        differences.append((relative_difference(value - start, wanted - start), name))
    return max(differences)


@pytest.mark.parametrize("name", ["TP1", "TP2", "TP2-PP2", "DP2", "TP2-SP"])
def test_layouts_equal_transformers(name: str, tiny_hf: Path, run_config: Callable[..., RunConfig]) -> None:
    difference, tensor = worst_update(whole_weights(run_config, name), tiny_hf)
    assert difference <= TOLERANCE, f"{tensor}: {difference:.2e}"


@pytest.mark.parametrize(("name", "precision"), [("TP2", "bf16"), ("TP2-PP2", "bf16"), ("TP2", "fp16")])
def test_main_parameters_of_half_precision_get_the_same_updates(
    name: str, precision: str, run_config: Callable[..., RunConfig]
) -> None:
    # Both start from weights rounded to half precision; that rounding is no part of the comparison.
    alone = whole_weights(run_config, "TP1", precision=precision)
    found = whole_weights(run_config, name, precision=precision)
    assert max(relative_difference(found[key], alone[key]) for key in alone) <= TOLERANCE


def leave_out_sums(self: Adafactor, parts: Any) -> None:
    """Take each rank's part for the whole."""


@pytest.mark.parametrize("fault", ["no sums over ranks", "padding counted"])
def test_wrong_ways_are_seen(
    fault: str, run_config: Callable[..., RunConfig], tiny_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no sums over ranks":
        monkeypatch.setattr(Adafactor, "_add_up", leave_out_sums)
    else:
        distribute = Adafactor.distribute

        def whole_rows(self: Adafactor, shards: Any, *, ranks: Any) -> None:
            size = ranks.size()
            padded = {
                parameter: replace(
                    shard,
                    own_rows=len(parameter),
                    shape=(len(parameter) * (size if shard.split_axis == 0 else 1), *shard.shape[1:]),
                )
                for parameter, shard in shards.items()
            }
            distribute(self, padded, ranks=ranks)

        monkeypatch.setattr(Adafactor, "distribute", whole_rows)
    difference, tensor = worst_update(whole_weights(run_config, "TP2"), tiny_hf)
    assert difference > 100 * TOLERANCE
    if fault == "padding counted":
        assert tensor == "embedding.word_embeddings.weight"


# Checkpoints


SAVED_AT = "TP2-PP2"
RESUMED_AT: dict[str, tuple[int, dict[str, Any]]] = {
    "same": LAYOUTS[SAVED_AT],
    "one process": (1, {}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "DP2": (2, {}),
}


def rank_first_half(prepared: PreparedRun) -> None:
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    adafactor_steps(trainer, range(STEPS // 2))
    trainer.step = STEPS // 2
    trainer.save()
    trainer.checkpoints.finish()  # it is written beside the training


def rank_second_half(prepared: PreparedRun) -> list[Shard]:
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    assert trainer.step == STEPS // 2, "the run was resumed"
    assert {group["step"] for group in trainer.optimizer.param_groups} == {STEPS // 2}
    return adafactor_steps(trainer, range(STEPS // 2, STEPS))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_goes_on_at_any_layout(precision: str, run_config: Callable[..., RunConfig]) -> None:
    sections: dict[str, Any] = {"optimizer": {"name": "adafactor"}, "precision": precision}
    expected = whole_weights(run_config, SAVED_AT, precision=precision)
    ranks, parallel = LAYOUTS[SAVED_AT]
    prepared = prepare_run(run_config(parallel=parallel, **sections), world_size=ranks)
    run_ranks(rank_first_half, world_size=ranks, arguments=(prepared,))
    for name, (world_size, other) in RESUMED_AT.items():
        if precision == "bf16" and name not in ("same", "one process"):
            continue
        prepared = prepare_run(run_config(parallel=other, **sections), world_size=world_size)
        found = assemble(run_ranks(rank_second_half, world_size=world_size, arguments=(prepared,)))
        for key, wanted in expected.items():
            ours = found[key][: len(wanted)]
            wanted = wanted[: len(ours)]
            if name == "same":
                assert torch.equal(ours, wanted), f"{key} at {name}"
            else:
                assert relative_difference(ours, wanted) <= TOLERANCE, f"{key} at {name}"


def test_statistics_are_stored_under_the_names_of_their_parameters(
    run_config: Callable[..., RunConfig],
) -> None:
    from tests.checkpoint.test_sharded import read_tensors

    ranks, parallel = LAYOUTS[SAVED_AT]
    config = run_config(parallel=parallel, optimizer={"name": "adafactor"})
    run_ranks(rank_first_half, world_size=ranks, arguments=(prepare_run(config, world_size=ranks),))
    [checkpoint] = (Path(config.output) / "checkpoints").glob("step_*")
    tensors = read_tensors(checkpoint)
    for name in OUR_NAMES:
        weight = tensors[name]
        if weight.dim() == 2:
            assert tensors[f"optimizer.state.exp_avg_sq_row.{name}"].shape == weight.shape[:1]
            assert tensors[f"optimizer.state.exp_avg_sq_col.{name}"].shape == weight.shape[1:]
            assert (tensors[f"optimizer.state.exp_avg_sq_col.{name}"] > 0).all()
        else:
            assert tensors[f"optimizer.state.exp_avg_sq.{name}"].shape == weight.shape


def test_a_resume_without_the_statistics_is_seen(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_weights(run_config, "TP2")
    ranks, parallel = LAYOUTS["TP2"]
    config = run_config(parallel=parallel, optimizer={"name": "adafactor"})
    run_ranks(rank_first_half, world_size=ranks, arguments=(prepare_run(config, world_size=ranks),))
    prepared = prepare_run(config, world_size=ranks)

    load = Adafactor.load_state_dict

    def load_the_step_alone(self: Adafactor, state: dict[str, Any]) -> None:
        load(self, state)
        for statistics in self.state.values():
            for statistic in statistics.values():
                statistic.zero_()

    monkeypatch.setattr(Adafactor, "load_state_dict", load_the_step_alone)
    found = assemble(run_ranks(rank_second_half, world_size=ranks, arguments=(prepared,)))
    assert max(relative_difference(found[key], expected[key]) for key in expected) > 100 * TOLERANCE


# Configuration


def test_defaults_are_those_of_t5x(run_config: Callable[..., RunConfig]) -> None:
    settings = run_config(optimizer={"name": "adafactor"}).optimizer
    assert (settings.lr, settings.weight_decay, settings.clip_grad) == (1e-3, 0.0, 0.0)
    assert run_config(optimizer={"name": "adafactor", "lr": 5e-4}).optimizer.lr == 5e-4
    again = run_config(optimizer=settings.model_dump(mode="json")).optimizer
    assert again == settings


def test_flat_shards_are_refused_when_the_configuration_is_read(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"adafactor.*use_distributed_optimizer.*cannot be combined"):
        run_config(optimizer={"name": "adafactor"}, parallel={"use_distributed_optimizer": True})


@pytest.mark.parametrize(
    "section", [{"name": "adafactor", "adam_beta2": 0.99}, {"adafactor_decay_rate": 0.7}], ids=["adafactor", "adamw"]
)
def test_keys_of_the_other_optimizer_are_refused(section: dict[str, Any], run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="has no meaning with name"):
        run_config(optimizer=section)
