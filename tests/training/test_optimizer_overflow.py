"""fp16 overflows: steps are skipped, the loss scale falls and is reported, a warning says what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training import optimizer as optimizer_module
from megatron_xmtf.training.loss_scale import OverflowWatch
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import LAYOUTS


def warned_steps(skipped: list[bool], caplog: pytest.LogCaptureFixture, **settings: Any) -> list[int]:
    watch, steps = OverflowWatch(enabled=True, **settings), []
    for step, overflowed in enumerate(skipped, start=1):
        caplog.clear()
        watch.after_step(step, skipped=overflowed, loss_scale=2.0 ** (30 - step))
        steps += [step] * len(caplog.records)
    return steps


def test_warns_at_the_fifth_overflow_in_a_row_and_then_ever_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    assert warned_steps([True] * 45, caplog) == [5, 10, 20, 40]
    assert warned_steps([True] * 4 + [False] + [True] * 4, caplog) == []
    assert warned_steps([False] + [True] * 6 + [False] + [True] * 6, caplog) == [6, 13]


def test_the_warning_names_steps_scale_and_remedy(caplog: pytest.LogCaptureFixture) -> None:
    watch = OverflowWatch(enabled=True)
    for step in range(11, 16):
        watch.after_step(step, skipped=True, loss_scale=2.0 ** (20 - step))
    [record] = caplog.records
    message = record.getMessage()
    assert "steps 11 to 15" in message and "5 times in a row" in message and "fallen to 32" in message
    assert "optimizer.lr" in message and "precision=bf16" in message
    for step in range(16, 21):
        watch.after_step(step, skipped=True, loss_scale=1.0)
    assert "cannot fall further" in caplog.records[-1].getMessage()


def test_one_rank_speaks(caplog: pytest.LogCaptureFixture) -> None:
    watch = OverflowWatch(enabled=False)
    for step in range(1, 20):
        watch.after_step(step, skipped=True, loss_scale=1.0)
    assert not caplog.records


class Kept(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def rank_overflows(prepared: PreparedRun) -> tuple[list[tuple[float, bool]], list[str]]:
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    handler = Kept()
    logging.getLogger("megatron_xmtf.training.loss_scale").addHandler(handler)
    trainer = Trainer(prepared, topology)
    steps = [trainer.train_step() for _ in range(10)]
    return [(step["loss_scale"], step["skipped"]) for step in steps], handler.messages


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_run_from_too_large_a_scale(
    name: str, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "INITIAL_LOSS_SCALE", 2.0**28)
    ranks, parallel = LAYOUTS["TP2"]
    config = run_config(parallel=parallel, precision="fp16", optimizer={"name": name})
    found = run_ranks(rank_overflows, world_size=ranks, arguments=(prepare_run(config, world_size=ranks),))
    assert found[0][0] == found[1][0], "all ranks skip together"
    steps = found[0][0]
    assert [skipped for _, skipped in steps[:5]] == [True] * 5
    # Megatron-Core keeps the scale at the first overflow (hysteresis 2) and halves it at each further one.
    assert [scale for scale, _ in steps[:5]] == [2.0**28, 2.0**28, 2.0**27, 2.0**26, 2.0**25]
    assert found[0][1] and "steps 1 to 5" in found[0][1][0]
    assert not found[1][1]


Snapshot = tuple[dict[str, torch.Tensor], list[int], float]


def snapshot(trainer: Trainer) -> Snapshot:
    """Return weights, main parameters and moments by name, the step counts, and the loss scale."""
    tensors = {}
    [part] = trainer.optimizer.chained_optimizers
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            tensors[name] = parameter.detach().clone()
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            number = len(tensors)
            tensors[f"{number}.main"] = parameter.detach().clone()
            for moment, value in part.optimizer.state[parameter].items():
                tensors[f"{number}.{moment}"] = value.clone()
    steps = [group["step"] for group in part.optimizer.param_groups]
    return tensors, steps, float(trainer.optimizer.get_loss_scale())


def rank_forced_overflow(prepared: PreparedRun) -> list[tuple[bool, bool, list[int], float]]:
    """Take a step, overflow on the last rank alone twice, take a step.

    Returns: of each: whether it updated, whether any tensor changed, the step counts, the loss scale after it.
    """
    torch.set_num_threads(1)
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    weigh = trainer._weigh
    found = []
    for overflows in (False, True, True, False):
        is_hit = overflows and topology.rank == topology.world_size - 1
        if is_hit and topology.dp_size > 1:
            # Before the reduction over data-parallel ranks: this rank's backward pass leaves fp16's range.
            def overflowing(batch: Any, losses: torch.Tensor) -> Any:
                return weigh(batch, losses * 1e30)

            trainer._weigh = overflowing  # type: ignore[method-assign]
        before = snapshot(trainer)
        trainer.forward_backward(trainer.loader.micro_batches(len(found)))
        trainer._weigh = weigh  # type: ignore[method-assign]
        if is_hit and topology.dp_size == 1:
            next(iter(trainer.chunks[-1].parameters())).main_grad.view(-1)[0] = float("inf")
        updated, _, _ = trainer.optimizer.step()
        tensors, steps, scale = snapshot(trainer)
        changed = tensors.keys() != before[0].keys() or any(
            not torch.equal(tensor, before[0][name]) for name, tensor in tensors.items()
        )
        found.append((updated, changed, steps, scale))
    return found


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2", "DP2-distributed-optimizer"])
def test_an_overflow_on_one_rank_changes_nothing_on_any(layout: str, run_config: Callable[..., RunConfig]) -> None:
    ranks, parallel = LAYOUTS[layout]
    prepared = prepare_run(run_config(parallel=parallel, precision="fp16"), world_size=ranks)
    found = run_ranks(rank_forced_overflow, world_size=ranks, arguments=(prepared,))
    scale = optimizer_module.INITIAL_LOSS_SCALE
    for steps in found:
        assert [(updated, changed) for updated, changed, _, _ in steps] == [
            (True, True),
            (False, False),
            (False, False),
            (True, True),
        ]
        assert [set(counts) for _, _, counts, _ in steps] == [{1}, {1}, {1}, {2}]
        # Megatron-Core lets the first overflow pass (hysteresis 2) and halves from the second one on.
        assert [after for *_, after in steps] == [scale, scale, scale / 2, scale / 2]
