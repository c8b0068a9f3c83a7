"""Two runs in one directory: the second is refused and told of the first; a dead run's lock is nobody's."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ExitCode, RunLockedError
from megatron_xmtf.training import launch, run_lock
from megatron_xmtf.training.run_lock import LOCK_FILE, RunLock


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.02)


def hold(output: Path, held: Any) -> None:
    RunLock(output).take()
    held.set()
    time.sleep(600)


@contextmanager
def another_run(output: Path) -> Iterator[Any]:
    """A process that holds the directory."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(output, held))
    process.start()
    assert held.wait(60)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_the_second_run_is_refused_and_goes_on_when_the_first_is_dead(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(schedule={"train_steps": 1})
    output = Path(config.output)
    with another_run(output) as first:
        with pytest.raises(RunLockedError) as caught:
            launch.train(config, nproc=1)
        assert caught.value.exit_code == ExitCode.USER
        assert f"process {first.pid} on {socket.gethostname()}" in str(caught.value)
        assert [path.name for path in output.iterdir()] == [LOCK_FILE], "no status over that of the first"
    assert (output / LOCK_FILE).exists(), "kill -9 leaves the file"
    assert launch.train(config, nproc=1)["last_step"] == 1
    assert not (output / LOCK_FILE).exists()


def test_a_run_that_waits_gets_the_lock_of_one_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 60.0)
    first, second = RunLock(tmp_path / "a" / "run"), RunLock(tmp_path / "a" / "run")
    first.take()
    threading.Timer(0.3, first.release).start()
    second.take()
    assert json.loads((tmp_path / "a" / "run" / LOCK_FILE).read_text())["process"] == os.getpid()
    second.release()
    second.release()
    assert list(tmp_path.iterdir()) == [], "directories that hold nothing go again"


def left_by(host: str, output: Path) -> Path:
    """Write the record of a run on another machine."""
    output.mkdir()
    record = {"host": host, "process": 1, "job": "77", "started": "then", "beats": 3}
    (output / LOCK_FILE).write_text(json.dumps(record))
    return output / LOCK_FILE


def test_a_silent_lock_of_another_machine_is_taken_over(tmp_path: Path) -> None:
    left_by("elsewhere", tmp_path / "run")
    started = time.monotonic()
    lock = RunLock(tmp_path / "run")
    lock.take()
    assert time.monotonic() - started >= 1.5, "it was watched for as long as a heartbeat may be late"
    lock.release()


def test_a_lock_of_another_machine_that_beats_is_respected(tmp_path: Path) -> None:
    path = left_by("elsewhere", tmp_path / "run")
    record = json.loads(path.read_text())
    threading.Timer(0.2, lambda: path.write_text(json.dumps({**record, "beats": 4}))).start()
    with pytest.raises(RunLockedError, match=r"process 1 on elsewhere, job 77.*heartbeat"):
        RunLock(tmp_path / "run").take()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def no_locks(*arguments: Any) -> None:
    raise OSError(errno.ENOTSUP, "no locks here")


def test_without_locks_in_the_file_system_heartbeats_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = RunLock(tmp_path / "run")
    first.take()
    with pytest.raises(RunLockedError, match="heartbeat"):
        RunLock(tmp_path / "run").take()
    first.release()
    second = RunLock(tmp_path / "run")
    second.take()
    second.release()


def test_a_run_that_was_taken_for_dead_ends_itself(tmp_path: Path) -> None:
    left = threading.Event()
    codes = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    lock = RunLock(tmp_path / "run", leave=leave)
    lock.take()
    (tmp_path / "run" / LOCK_FILE).unlink()
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "process": 2, "started": "now"}))
    assert left.wait(60) and codes == [int(ExitCode.FAILED)]
    lock.release()
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["host"] == "elsewhere", "it is not ours to remove"
