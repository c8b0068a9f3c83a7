"""NaN and Inf, put into one rank's loss or gradient at a chosen step, never reach a weight of any rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ExitCode, NonFiniteError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training import launch
from megatron_xmtf.training.prepare import PreparedRun, open_training_rows, prepare_run
from megatron_xmtf.training.step_guard import StepGuard
from megatron_xmtf.training.trainer import Trainer, _parameters_gathered
from tests.layouts import LAYOUTS
from tests.training.test_optimizer_overflow import Snapshot, snapshot

NAN, INF = float("nan"), float("inf")


def poison_gradient(trainer: Trainer, value: float) -> None:
    """Put a value into one number of this rank's gradients: after the reductions, or it would be on all ranks."""
    plain = trainer.forward_backward

    def poisoned(batches: Any) -> Any:
        reports = plain(batches)
        list(trainer.chunks[-1].parameters())[-1].main_grad.view(-1)[0] = value
        trainer.forward_backward = plain  # type: ignore[method-assign]
        return reports

    trainer.forward_backward = poisoned  # type: ignore[method-assign]


def gathered_snapshot(trainer: Trainer) -> Snapshot:
    """Take a snapshot; with overlap_param_gather weights are those of the step before until they are gathered."""
    with _parameters_gathered(trainer.chunks, trainer.config):
        return snapshot(trainer)


def rank_bad_gradient(prepared: PreparedRun, guarded: bool) -> list[tuple[bool, bool, list[int]]]:
    """Take a step, one with NaN on the last rank alone, one with Inf, and a step.

    Returns: of each: whether it was skipped, whether any tensor of this rank changed, the step counts.
    """
    torch.set_num_threads(1)
    topology = initialize_parallel(prepared.config.parallel, seed=1)
    trainer = Trainer(prepared, topology)
    if not guarded:
        trainer.guard.reason = lambda *arguments, **keywords: None  # type: ignore[method-assign]
    found = []
    for value in (None, NAN, INF, None):
        if value is not None and topology.rank == topology.world_size - 1:
            poison_gradient(trainer, value)
        before = gathered_snapshot(trainer)
        skipped = trainer.train_step()["skipped"]
        tensors, steps, _ = gathered_snapshot(trainer)
        changed = tensors.keys() != before[0].keys() or any(
            not torch.equal(tensor, before[0][name]) for name, tensor in tensors.items()
        )
        found.append((skipped, changed, steps))
    return found


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("TP2", "bf16"), ("PP2", "fp32"), ("DP2", "fp32"), ("DP2-distributed-optimizer", "bf16"), ("DP2-overlap", "bf16")],
)
def test_a_bad_gradient_on_one_rank_changes_nothing_on_any(
    layout: str, precision: str, run_config: Callable[..., RunConfig]
) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = run_config(parallel=parallel, precision=precision, loss={"non_finite": "skip"})
    found = run_ranks(rank_bad_gradient, world_size=ranks, arguments=(prepare_run(config, world_size=ranks), True))
    for steps in found:
        assert [(skipped, changed) for skipped, changed, _ in steps] == [
            (False, True),
            (True, False),
            (True, False),
            (False, True),
        ]
        assert [set(counts) for _, _, counts in steps] == [{1}, {1}, {1}, {2}]


def test_without_the_guard_megatron_core_steps_on_it(run_config: Callable[..., RunConfig]) -> None:
    """The negative control, and what Megatron-Core does in fp32 today: the step counts as done, its weights are NaN."""
    prepared = prepare_run(run_config(), world_size=1)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        run_ranks(rank_bad_gradient, world_size=1, arguments=(prepared, False))


def poison_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Add a value to the losses of the first row's first example on the last rank, at chosen steps."""
    plain = Trainer._weigh

    def poisoned(self: Trainer, batch: Any, values: torch.Tensor) -> Any:
        if self.step in losses and self.topology.rank == self.topology.world_size - 1:
            mask = torch.zeros_like(values)
            mask[0][(batch.segment_ids[0] == 1).to(values.device)] = losses[self.step]
            values = values + mask
        return plain(self, batch, values)

    monkeypatch.setattr(Trainer, "_weigh", poisoned)


def bad_steps(config: RunConfig) -> list[dict[str, Any]]:
    path = Path(config.output) / "bad_steps.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_example(config: RunConfig, row: int) -> dict[str, Any]:
    """Name a row's first example from the data themselves: languages alternate in `tests.tiny.write_records`."""
    rows = open_training_rows(prepare_run(config, world_size=1))
    example = int(rows[row].example_ids[0])
    return {"dataset": "tiny", "language": ["en", "fr"][example % 2], "example": example}


def test_a_bad_loss_ends_the_run_with_its_examples(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_losses(monkeypatch, {2: NAN})
    config = run_config(schedule={"train_steps": 4}, checkpoint={"save_interval": 1})
    with pytest.raises(NonFiniteError, match=r"step 2: loss nan; examples: tiny/(en|fr) #\d+, .* Nothing was updated"):
        launch.train(config, nproc=2)
    [line] = bad_steps(config)
    assert (line["step"], line["reason"], line["action"]) == (2, "loss", "ended")
    # Step 2 reads rows 8 to 15 in micro-batches of 2, dealt to the two ranks in turn: rank 1 has 10, 11 and 14, 15.
    expected = [first_example(config, row) for row in (10, 14)]
    assert sorted(line["examples"], key=str) == sorted(expected, key=str)
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == ["step_0000001"]


def test_bad_losses_are_passed_over_up_to_the_limit_also_across_a_resume(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_losses(monkeypatch, {2: INF, 4: NAN})
    loss = {"non_finite": "skip", "max_skipped_steps": 1}
    config = run_config(schedule={"train_steps": 5}, checkpoint={"save_interval": 3}, loss=loss)
    for _ in range(2):  # the second time resumed from step 3, with one step passed over before it
        with pytest.raises(NonFiniteError, match=r"step 4: loss nan.* 1 steps were passed over"):
            launch.train(config, nproc=2)
    assert [(line["step"], line["action"]) for line in bad_steps(config)] == [
        (2, "skipped"),
        (4, "ended"),
        (4, "ended"),
    ]
    assert (
        launch.train(config.model_copy(update={"loss": config.loss.model_copy(update={"max_skipped_steps": 2})}))[
            "last_step"
        ]
        == 5
    )


def test_a_spike_and_the_steps_behind_it_are_passed_over(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_losses(monkeypatch, {6: 1000.0})
    loss = {"spike_window": 4, "spike_skip_steps": 2}
    config = run_config(schedule={"train_steps": 9}, checkpoint={"save_interval": 6, "keep_last": 3}, loss=loss)
    launch.train(config, nproc=2)

    def lines() -> list[dict[str, Any]]:
        text = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    whole = lines()
    assert [line["step"] for line in whole if line["skipped"]] == [6, 7]
    assert [(line["reason"], len(line["examples"]) > 1) for line in bad_steps(config)] == [
        ("spike", True),
        ("after a spike", True),
    ]
    # A run resumed in the middle of the window passes over the same steps.
    import shutil

    shutil.rmtree(Path(config.output) / "checkpoints" / "step_0000009")
    launch.train(config, nproc=2)
    keys = ("step", "loss", "grad_norm", "skipped")
    assert [[line[key] for key in keys] for line in lines()] == [[line[key] for key in keys] for line in whole]


def test_the_rule_of_spikes_by_hand(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings = run_config(loss={"spike_window": 4, "spike_deviations": 2.0}).loss
    guard = StepGuard(settings, output=tmp_path, resumed_step=0, datasets=[])
    # The window 1 3 1 3 has mean 2 and deviation 1: above 4 is a spike.
    reasons = [guard.reason(step, loss, bad_gradients=False) for step, loss in enumerate([9, 1, 3, 1, 3], start=1)]
    assert reasons == [None] * 5
    assert guard.reason(6, 4.01, bad_gradients=False) == "spike"
    assert guard.reason(7, 4.01, bad_gradients=False) == "spike", "a spike does not enter the window"
    assert guard.reason(8, 4.0, bad_gradients=False) is None
    assert guard.reason(9, 1.0, bad_gradients=True) == "gradient"
    assert guard.reason(10, NAN, bad_gradients=False) == "loss"


def test_weights_that_are_not_finite_are_never_saved(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer.save

    def spoiled(self: Trainer) -> Path:
        if self.step == 2 and self.topology.rank == 1:
            next(iter(self.chunks[0].parameters())).data.view(-1)[0] = NAN
        return plain(self)

    monkeypatch.setattr(Trainer, "save", spoiled)
    config = run_config(schedule={"train_steps": 4}, checkpoint={"save_interval": 1})
    with pytest.raises(NonFiniteError, match="1 tensors of rank 1 hold NaN or Inf") as caught:
        launch.train(config, nproc=2)
    assert caught.value.exit_code == ExitCode.NON_FINITE
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == ["step_0000001"]
