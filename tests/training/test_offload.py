"""`optimizer.offload: cpu` changes where AdamW's moments are, and nothing else: updates, checkpoints, layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.group_step_adam import GroupStepAdam
from megatron_xmtf.training.offloaded_adam import OffloadedAdam
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer, train_rank
from tests.layouts import LAYOUTS
from tests.training.test_optimizer import SETTINGS, assert_same, parameter_groups, run


def test_equals_adamw_of_torch_bit_by_bit() -> None:
    expected = run(torch.optim.AdamW(parameter_groups(), fused=True, **SETTINGS), range(8))
    assert_same(run(OffloadedAdam(parameter_groups(), **SETTINGS), range(8)), expected)


def test_another_step_size_is_seen() -> None:
    expected = run(torch.optim.AdamW(parameter_groups(), fused=True, **SETTINGS), range(8))
    late = OffloadedAdam(parameter_groups(), **SETTINGS)
    late.param_groups[0]["step"] = 1
    assert not torch.equal(run(late, range(8))[0], expected[0])


def test_half_precision_parameters_are_no_main_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(AssertionError, match="fp32"):
        OffloadedAdam([parameter], **SETTINGS).step()


def test_state_made_elsewhere_is_fetched_and_staging_is_as_large_as_the_largest_parameter() -> None:
    groups = parameter_groups()
    optimizer = OffloadedAdam(groups, **SETTINGS)
    # As Megatron-Core makes state on the parameter's device before it loads; `meta` stands for a GPU.
    matrix = groups[0]["params"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[matrix][name] = torch.zeros_like(matrix)
    run(optimizer, range(2))
    assert optimizer._staged.shape == (2, 35), "of the 7 x 5 matrix, kept for the smaller ones"
    assert all(tensor.device.type == "cpu" for state in optimizer.state.values() for tensor in state.values())
    assert [sorted(state) for state in optimizer.state.values()] == [["exp_avg", "exp_avg_sq"]] * 3


def rank_weights(prepared: PreparedRun) -> tuple[str, list[list[float]]]:
    """Train four steps; return the class of the inner optimizer and some of every weight."""
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    for _ in range(4):
        trainer.train_step()
    [part] = trainer.optimizer.chained_optimizers
    weights = [parameter.detach().flatten()[:40].tolist() for parameter in trainer.chunks[0].parameters()]
    return type(part.optimizer).__name__, weights


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("TP2", "fp32"), ("PP2", "bf16"), ("DP2-distributed-optimizer", "bf16"), ("DP2-overlap", "fp32")],
)
def test_trains_the_same(layout: str, precision: str, run_config: Callable[..., RunConfig]) -> None:
    ranks, parallel = LAYOUTS[layout]
    found = {}
    for offload in ("none", "cpu"):
        config = run_config(parallel=parallel, precision=precision, optimizer={"lr": 1e-3, "offload": offload})
        prepared = prepare_run(config, world_size=ranks)
        found[offload] = run_ranks(rank_weights, world_size=ranks, arguments=(prepared,))
    assert {name for name, _ in found["none"]} == {GroupStepAdam.__name__}
    assert {name for name, _ in found["cpu"]} == {OffloadedAdam.__name__}
    assert [weights for _, weights in found["cpu"]] == [weights for _, weights in found["none"]]


@pytest.mark.parametrize(
    ("layout", "turns"),
    [
        ("TP2", [("none", "cpu")]),
        ("DP2-distributed-optimizer", [("none", "cpu"), ("cpu", "none")]),
    ],
)
def test_a_run_resumes_exactly_whichever_way_the_checkpoint_was_written(
    layout: str, turns: list[tuple[str, str]], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    ranks, parallel = LAYOUTS[layout]

    def train(output: str, steps: int, offload: str) -> Any:
        config = run_config(
            output=str(tmp_path / output),
            parallel=parallel,
            precision="bf16",
            schedule={"train_steps": steps, "lr_decay_style": "constant"},
            optimizer={"lr": 1e-3, "offload": offload},
        )
        return run_ranks(train_rank, world_size=ranks, arguments=(prepare_run(config, world_size=ranks),))[0]

    whole = train("whole", 6, "none")
    for first, second in turns:
        output = f"{first}-{second}"
        train(output, 3, first)
        resumed = train(output, 6, second)
        assert (resumed["first_step"], resumed["last_loss"]) == (4, whole["last_loss"]), output


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "adafactor", "offload": "cpu"}}, "cannot be combined with name: adafactor"),
        ({"optimizer": {"offload": "cpu"}, "kernels": {"adam": "apex"}}, "kernels.adam=apex"),
        ({"optimizer": {"name": "adafactor"}, "kernels": {"adam": "transformer_engine"}}, "kernels.adam"),
        ({"optimizer": {"offload": "nvme"}}, "'none' or 'cpu'"),
    ],
)
def test_what_cannot_be_combined_is_an_error(
    sections: dict[str, Any], message: str, run_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(**sections)
