"""Counting starts and deciding what follows, without a Slurm; tests/slurm sees the same decisions obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.cluster.attempts import Limits, begin_attempt, end_attempt
from megatron_xmtf.cluster.status import run_status

LIMITS = Limits(without_progress=3, in_all=None, requeue_on=("requeue", "hang", "failed"))
JOB = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "n[1-2]"}


def begin(output: Path, submission: str = "s", limits: Limits = LIMITS) -> str:
    return str(begin_attempt(output, submission=submission, limits=limits, environment=JOB))


def end(output: Path, *, launcher_code: int = 1, **keywords: Any) -> str:
    decision = end_attempt(
        output, submission="s", launcher_code=launcher_code, limits=LIMITS, environment=JOB, **keywords
    )
    return str(decision)


def leave(output: Path, code: int, *, step: int | None = None, checkpoint: int | None = None) -> None:
    """Leave what a run leaves: status.json, with a step where it ended by itself, and a checkpoint."""
    steps = {} if step is None else {"step": step, "train_steps": 100}
    (output / "status.json").write_text(
        json.dumps({"exit_code": code, "name": "N", "message": f"code {code}", **steps})
    )
    if checkpoint is not None:
        directory = output / "checkpoints" / f"step_{checkpoint:07d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").touch()


def test_a_status_of_the_attempt_before_does_not_count(tmp_path: Path) -> None:
    assert begin(tmp_path) == "train 0"
    leave(tmp_path, 3, step=10, checkpoint=10)
    assert end(tmp_path) == "requeue 3"
    assert begin(tmp_path) == "train 0"
    assert not (tmp_path / "status.json").exists()
    assert end(tmp_path, launcher_code=143) == "requeue 1"  # died without a word
    assert begin(tmp_path) == "train 0"
    assert end(tmp_path, launcher_code=143, told_to_stop=True) == "requeue 3"  # told to, while it was starting
    assert begin(tmp_path, submission="another") == "train 0"
    leave(tmp_path, 3, step=20)
    assert end(tmp_path, is_cancelled=True) == "leave 3"  # by scancel: the script has no say


@pytest.mark.parametrize(
    ("code", "decided"),
    [(1, "requeue 1"), (2, "stop 2"), (3, "requeue 3"), (4, "stop 4"), (5, "stop 5"), (6, "requeue 6"), (7, "stop 7")],
)
def test_outcomes_that_would_only_come_again_end_it(code: int, decided: str, tmp_path: Path) -> None:
    begin(tmp_path)
    leave(tmp_path, code)
    assert end(tmp_path) == decided


def test_starts_without_progress_are_counted_whether_or_not_they_ended(tmp_path: Path) -> None:
    for _ in range(3):
        assert begin(tmp_path) == "train 0"  # and killed
    assert begin(tmp_path) == "stop 1"
    assert begin(tmp_path, submission="another") == "train 0"
    leave(tmp_path, 3, step=40, checkpoint=40)
    assert begin(tmp_path) == "train 0"  # there is a new checkpoint


def test_a_limit_on_all_starts(tmp_path: Path) -> None:
    limits = Limits(without_progress=3, in_all=2, requeue_on=("requeue",))
    for step in (10, 20):
        assert begin(tmp_path, limits=limits) == "train 0"
        leave(tmp_path, 3, step=step, checkpoint=step)
    assert begin(tmp_path, limits=limits) == "stop 3"


def test_only_a_run_at_its_last_step_is_done(tmp_path: Path) -> None:
    begin(tmp_path)
    leave(tmp_path, 0, step=40)
    assert end(tmp_path) == "stop 1"  # stopped by its file: what waits for a finished run must not start
    leave(tmp_path, 0, step=100)
    assert end(tmp_path) == "done 0"
    assert begin(tmp_path) == "done 0"


def test_the_links_of_a_chain_leave_it_to_the_next(tmp_path: Path) -> None:
    begin(tmp_path)
    leave(tmp_path, 3, step=10, checkpoint=10)
    assert end(tmp_path, link=1, links=2) == "stop 3"
    assert end(tmp_path, link=2, links=2) == "requeue 3"


def test_a_stop_file_lets_nothing_start(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert begin(tmp_path) == "stop 2"


def test_status_without_a_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    begin(tmp_path)
    lines = [{"step": step, "loss": 5.0 - step, "step_time_ms": 500.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    (tmp_path / "config.yaml").write_text("schedule: {train_steps: 100}\n")
    job = {"job": "12", "kind": "train", "link": 1, "links": 1}
    (tmp_path / "slurm" / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    status = run_status(tmp_path)
    assert (status.step, status.loss, status.train_steps, status.seconds_left) == (2, 3.0, 100, 49.0)
    assert (status.attempts, status.outcome, status.jobs[0]["state"]) == (1, None, "unknown")
    assert (status.jobs[0]["source"], status.unanswered) == ("notes", ["no Slurm on this machine"])
    assert main(["submit", "--status", str(tmp_path)]) == 0
    assert "step      2 of 100, loss 3.0000" in capsys.readouterr().out
    assert main(["submit", "--status", str(tmp_path / "nothing")]) == 2


def test_an_element_of_an_array_has_the_name_that_slurm_takes(tmp_path: Path) -> None:
    """SLURM_JOB_ID is another number, and the last element's is the whole array's."""
    element = {**JOB, "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "1"}
    begin_attempt(tmp_path, submission="s", limits=LIMITS, environment=element)
    (line,) = (tmp_path / "slurm" / "attempts.jsonl").read_text().splitlines()
    assert json.loads(line)["job"] == "11_1"
