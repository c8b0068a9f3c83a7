"""Dying well: who hangs is named with host, step, phase and stacks; who is slow is left alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.config.running import WatchdogConfig
from megatron_xmtf.data.loader import BatchLoader
from megatron_xmtf.errors import ExitCode, HangError, RankFailedError
from megatron_xmtf.training import launch
from megatron_xmtf.training.trainer import Trainer
from megatron_xmtf.training.watchdog import Watchdog

LIMIT = 4.0 / 60
"""Minutes; the ranks of these tests are stuck for good, so being slow only makes them end later."""
WATCHED = {"watchdog": {"progress_minutes": LIMIT, "start_minutes": 5.0}, "schedule": {"train_steps": 4}}


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def quiet(tmp_path: Path, clock: Clock, **limits: Any) -> Watchdog:
    return Watchdog(WatchdogConfig(**limits), directory=tmp_path, rank=0, world_size=1, clock=clock)


def looks(watchdog: Watchdog, clock: Clock, seconds: int, beat_every: int | None = None) -> list[int]:
    """Look once a second; return the seconds at which the watchdog would bite."""
    found = []
    for second in range(1, seconds + 1):
        clock.now += 1
        if beat_every and second % beat_every == 0:
            watchdog.beat()
        if watchdog.look():
            found.append(second)
    return found


def test_each_phase_has_its_own_limit(tmp_path: Path) -> None:
    clock = Clock()
    watchdog = quiet(tmp_path, clock, progress_minutes=1, start_minutes=2, validation_minutes=3, save_minutes=4)
    for name, limit in [("starting", 120), ("reading data", 120), ("updating", 120)]:  # of the first step
        watchdog.phase(name, step=0)
        assert looks(watchdog, clock, limit + 5)[0] in (limit + 1, limit + 2), name
    for name, limit in [("reading data", 60), ("forward and backward", 60), ("validating", 180), ("saving", 240)]:
        watchdog.phase(name, step=2)
        assert looks(watchdog, clock, limit + 5)[0] in (limit + 1, limit + 2), name


def test_a_slow_step_whose_micro_batches_go_on_is_left_alone(tmp_path: Path) -> None:
    clock = Clock()
    watchdog = quiet(tmp_path, clock, progress_minutes=1)
    watchdog.phase("updating", step=1)
    watchdog.phase("forward and backward", step=2)
    assert looks(watchdog, clock, 3000, beat_every=55) == []
    assert looks(watchdog, clock, 100) != []


def test_time_in_which_the_job_was_suspended_does_not_count(tmp_path: Path) -> None:
    clock = Clock()
    watchdog = quiet(tmp_path, clock, progress_minutes=1)
    watchdog.phase("updating", step=1)
    watchdog.phase("forward and backward", step=2)
    assert looks(watchdog, clock, 20) == []
    clock.now += 10_000
    assert looks(watchdog, clock, 10) == []


def hang_in(target: Any, name: str, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """Make rank 1 hang at its third call of a function."""
    plain = getattr(target, name)
    calls: list[None] = []

    def hanging(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            how()
        return plain(*arguments, **keywords)

    monkeypatch.setattr(target, name, hanging)


def stuck_for_good() -> None:
    time.sleep(3600)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("target", "name", "how", "words"),
    [
        (BatchLoader, "micro_batches", stuck_for_good, r"made no progress for .* s: step 3, reading data"),
        (Trainer, "forward_backward", stop_self, r"does not answer; the others were at step 3"),
    ],
)
def test_a_rank_that_hangs_ends_the_job_and_is_named(
    target: Any, name: str, how: Any, words: str, run_config: Callable[..., RunConfig], monkeypatch: Any
) -> None:
    hang_in(target, name, monkeypatch, how)
    config = run_config(**WATCHED)
    with pytest.raises(HangError, match=rf"rank 1 on {socket.gethostname()} \(process \d+\) {words}") as caught:
        launch.train(config, nproc=2)
    assert caught.value.exit_code == ExitCode.HANG == 6
    status = json.loads((Path(config.output) / "status.json").read_text(encoding="utf-8"))
    assert status["exit_code"] == 6 and "rank 1" in status["message"]
    stacks = Path(config.output) / "stacks"
    assert "forward_backward" in (stacks / "rank_0.txt").read_text(encoding="utf-8")
    if how is stuck_for_good:
        assert "stuck_for_good" in (stacks / "rank_1.txt").read_text(encoding="utf-8")
        assert "stuck_for_good" in str(caught.value)


def test_a_rank_that_raises_is_named_with_its_place_and_the_others_are_listed_below(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("by hand")

    hang_in(BatchLoader, "micro_batches", monkeypatch, fail)
    with pytest.raises(RankFailedError) as caught:
        launch.train(run_config(**WATCHED), nproc=2)
    message = str(caught.value)
    place = f"(rank 1 on {socket.gethostname()}, step 3, reading data)"
    assert message.startswith(f"rank 1 failed: ZeroDivisionError: by hand {place}")
    assert message.count("Traceback") <= 2, "of one rank alone: its error and what it was raised from"
