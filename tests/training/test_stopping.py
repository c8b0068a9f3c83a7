"""Stopping well: signals at chosen moments, one decision of all ranks, a checkpoint, and the undisturbed curve."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.config import RunConfig
from megatron_xmtf.config.running import StopConfig
from megatron_xmtf.errors import ConfigError, ExitCode, RankFailedError, StoppedError
from megatron_xmtf.parallel import stop_forwarding
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.stop_forwarding import STOP_SIGNALS, StopForwarding
from megatron_xmtf.training import launch
from megatron_xmtf.training.stopping import StopCause, StopRequests, stop_time
from megatron_xmtf.training.trainer import Trainer
from tests.checkpoint.test_sharded import read_tensors

STEPS = 6
SECTIONS: dict[str, Any] = {"schedule": {"train_steps": STEPS, "lr_decay_style": "linear"}}
COUNTED = ("loss", "grad_norm", "learning_rate", "rows", "examples", "tokens", "skipped")


def metrics(config: RunConfig) -> dict[int, dict[str, Any]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def status(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path(config.output) / "status.json").read_text(encoding="utf-8"))
    return values


def last_tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    return read_tensors(Path(config.output) / "checkpoints" / f"step_{STEPS:07d}")


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import make_run_config

    config = make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("whole"))(**SECTIONS)
    assert launch.train(config, nproc=2)["stopped_by"] is None
    return metrics(config), last_tensors(config)


def send(when: str, to: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rank 1 send a signal at a chosen place of step 3."""
    name = {"in the loop": "forward_backward", "before an update": "_update", "during a save": "save"}[when]
    plain = getattr(Trainer, name)

    def sending(self: Trainer, *arguments: Any, **keywords: Any) -> Any:
        result = plain(self, *arguments, **keywords)
        if self.step == 3 and self.topology.rank == 1 and not self.prepared.start.resumed:
            os.kill(os.getpid() if to == "one rank" else os.getppid(), number)
            if to == "all":
                os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, name, sending)


@pytest.mark.parametrize(
    ("when", "to", "number", "save_interval"),
    [
        ("in the loop", "one rank", signal.SIGUSR1, None),
        ("during a save", "launcher", signal.SIGTERM, 3),
        ("before an update", "all", signal.SIGTERM, None),
    ],
)
def test_a_signal_stops_all_ranks_together_and_the_same_command_goes_on_bit_identical(
    when: str,
    to: str,
    number: signal.Signals,
    save_interval: int | None,
    undisturbed: Any,
    run_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send(when, to, number, monkeypatch)
    config = run_config(**SECTIONS, checkpoint={"save_interval": save_interval})
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    result = launch.train(config, nproc=2)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    assert result["exit_code"] == ExitCode.REQUEUE and result["stopped_by"] == number.name
    step = result["last_step"]
    if (when, to) == ("in the loop", "one rank"):
        assert step == 3  # sent before the vote of step 3
    assert 3 <= step < STEPS
    assert result["checkpoint"] is not None and open_manifest(Path(result["checkpoint"])).step == step
    assert sorted(metrics(config)) == list(range(1, step + 1))
    assert status(config)["exit_code"] == 3 and number.name in status(config)["message"]
    assert multiprocessing.active_children() == []
    assert launch.train(config, nproc=2)["exit_code"] == 0
    whole, tensors = undisturbed
    found = metrics(config)
    assert {n: [found[n][key] for key in COUNTED] for n in found} == {
        n: [whole[n][key] for key in COUNTED] for n in whole
    }
    ours = last_tensors(config)
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[key], tensors[key]) for key in ours)


def test_the_stop_file_ends_with_0_and_keeps_the_run_from_starting(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer.forward_backward

    def touching(self: Trainer, batches: Any) -> Any:
        if self.step == 2 and self.topology.rank == 0:
            (Path(self.config.output) / "stop").touch()
        return plain(self, batches)

    monkeypatch.setattr(Trainer, "forward_backward", touching)
    config = run_config(**SECTIONS)
    result = launch.train(config, nproc=2)
    assert (result["last_step"], result["exit_code"]) == (2, 0)
    assert status(config)["exit_code"] == 0 and "stop" in status(config)["message"]
    with pytest.raises(ConfigError, match="asks this run not to train"):
        launch.train(config, nproc=2)
    (Path(config.output) / "stop").unlink()
    monkeypatch.undo()
    assert launch.train(config, nproc=2)["first_step"] == 3


def test_the_earliest_time_limit_counts() -> None:
    config = StopConfig(time_limit_minutes=10, slurm_margin_minutes=10)
    assert stop_time(config, started=1000, environment={}) == 1600
    assert stop_time(config, started=1000, environment={"SLURM_JOB_END_TIME": "2000"}) == 1400
    assert stop_time(config, started=1000, environment={"SLURM_JOB_END_TIME": "9000"}) == 1600
    assert stop_time(StopConfig(), started=1000, environment={"SLURM_JOB_END_TIME": "Unknown"}) is None


def test_a_time_limit_stops_after_a_step(run_config: Callable[..., RunConfig], monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    result = launch.train(run_config(**SECTIONS), nproc=1)
    assert (result["last_step"], result["stopped_by"], result["exit_code"]) == (1, "the time limit", 3)


def test_the_weightiest_reason_is_told_and_signals_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    (tmp_path / "stop").touch()
    with StopRequests(StopConfig(), output=tmp_path, started=time.time(), reads_file=True) as requests:
        assert requests.now() is StopCause.STOP_FILE
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert requests.now() is StopCause.SIGTERM
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    with StopRequests(StopConfig(), output=tmp_path, started=time.time(), reads_file=False) as requests:
        assert requests.now() is StopCause.NONE
    with StopRequests(
        StopConfig(time_limit_minutes=1), output=tmp_path, started=time.time() - 61, reads_file=True
    ) as requests:
        assert requests.now() is StopCause.TIME_LIMIT


def test_a_signal_while_inputs_are_prepared_stops_at_once(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preparing(*arguments: Any, **keywords: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("preparing went on")

    monkeypatch.setattr(launch, "prepare_run", preparing)
    config = run_config()
    Path(config.output).mkdir()
    with pytest.raises(StoppedError, match="SIGTERM before the first step"):
        launch.train(config, nproc=1)
    assert status(config)["exit_code"] == 3


def ask_parent_and_wait(times: int) -> None:
    """Signal the launcher; then wait with the signals blocked, as a rank does that never comes to a step's end."""
    for _ in range(times):
        os.kill(os.getppid(), signal.SIGTERM)
        while signal.SIGTERM not in signal.sigpending():
            time.sleep(0.01)
        time.sleep(0.05)
    time.sleep(600)


@pytest.mark.parametrize(("times", "grace", "impatience"), [(1, 0.2, 1000.0), (50, 1000.0, 0.0)])
def test_ranks_that_do_not_end_are_killed_after_the_grace_or_a_second_signal(
    times: int, grace: float, impatience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_forwarding, "IMPATIENCE_SECONDS", impatience)
    with (
        StopForwarding(grace_seconds=grace) as stop,
        pytest.raises(RankFailedError, match="SIGTERM: ranks 0 had not"),
    ):
        run_ranks(ask_parent_and_wait, world_size=1, arguments=(times,), stop=stop)
    assert multiprocessing.active_children() == []
