"""Who tells what a job came to: queue, accounting, or its own notes; by Slurm's documented output, written by hand.

tests/slurm/test_status.py asks the real commands, with slurmdbd and without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.cluster.shell import quote
from megatron_xmtf.cluster.status import run_status

UNKNOWN_JOB = "slurm_load_jobs error: Invalid job id specified"
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ACCOUNTING = "Slurm accounting storage is disabled"

Slurm = Callable[..., None]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Put a squeue and a sacct in the path that print what they are given; the words asked go to NAME.words."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))

    def put(*, squeue: str = "", sacct: str | None = "", fails: tuple[str, ...] = ()) -> None:
        for name, text in (("sbatch", ""), ("squeue", squeue), ("sacct", sacct), ("scancel", "")):
            (directory / name).unlink(missing_ok=True)
            if text is None:
                continue
            words = f'printf "%s\\n" "$@" > {quote(str(directory / name))}.words'
            (directory / name).write_text(f"#!/bin/bash\n{words}\n{_printing(text, is_error=name in fails)}\n")
            (directory / name).chmod(0o755)

    return put


def _printing(text: str, *, is_error: bool) -> str:
    words = " ".join(quote(line) for line in text.splitlines())
    if is_error:
        return f"printf '%s\\n' {words} >&2; exit 1"
    return f"printf '%s\\n' {words}" if words else "true"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which a chain of two jobs, and an array of three verbs, were submitted."""
    directory = tmp_path / "it's $(run)" / "slurm"
    directory.mkdir(parents=True)
    common = {"submission": "s", "script": str(directory / "s.sbatch"), "links": 2}
    jobs = [
        {**common, "job": "12", "kind": "train", "link": 1},
        {**common, "job": "13", "kind": "train", "link": 2},
        {**common, "job": "14", "kind": "evaluate", "link": 1, "links": 1},
    ]
    (directory / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return directory.parent


def told(run: Path) -> list[tuple[str, str, str | None]]:
    return [(job["state"], job["reason"], job["source"]) for job in run_status(run).jobs]


def test_queue_then_accounting(slurm: Slurm, run: Path, tmp_path: Path) -> None:
    slurm(
        squeue="13|PENDING|Dependency|\n14_1|RUNNING|None|n[1-2]\n14_2|PENDING|Resources|",
        sacct="12|CANCELLED by 1000|0:0|n[1-2]\n14_0|FAILED|2:0|n1\n14_[1-2]|PENDING|0:0|None assigned",
    )
    assert told(run) == [
        ("CANCELLED", "exit 0:0 on n[1-2]", "accounting"),
        ("PENDING", "Dependency", "queue"),
        ("1 FAILED, 1 RUNNING, 1 PENDING", "", "accounting, queue"),
    ]
    asked = (tmp_path / "bin" / "squeue.words").read_text().splitlines()
    assert "--jobs=12,13,14" in asked, "the controller is not asked for everybody's jobs"
    assert "--jobs=12,14" in (tmp_path / "bin" / "sacct.words").read_text().splitlines()


@pytest.mark.parametrize(
    ("answers", "unanswered"),
    [
        ({"squeue": UNKNOWN_JOB, "sacct": NO_ACCOUNTING, "fails": ("squeue", "sacct")}, [f"sacct: {NO_ACCOUNTING}"]),
        ({"squeue": UNKNOWN_JOB, "sacct": None, "fails": ("squeue",)}, ["sacct: not on this machine"]),
        (
            {"squeue": NO_CONTROLLER, "sacct": NO_ACCOUNTING, "fails": ("squeue", "sacct")},
            [f"squeue: {NO_CONTROLLER}", f"sacct: {NO_ACCOUNTING}"],
        ),
        ({"squeue": "", "sacct": ""}, []),  # accounting that has nothing of these jobs
    ],
)
def test_notes_of_the_jobs_where_nobody_else_knows(
    answers: dict[str, Any], unanswered: list[str], slurm: Slurm, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(**answers)
    begun = [{"event": "begin", "submission": "s", "job": "12", "step": 0}]
    ended = {"event": "end", "submission": "s", "job": "12", "code": 3, "step": 40, "decision": "stop", "why": "w"}
    (run / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*begun, ended]))
    for element, code in enumerate((0, 0, 2)):
        (run / "slurm" / f"ended-14_{element}").write_text(f"{code}\n")
    assert told(run) == [
        ("FAILED", "code 3", "notes"),
        ("unknown", "neither the queue nor the accounting nor its own notes tell of it", None),
        ("2 COMPLETED, 1 FAILED", "", "notes"),
    ]
    assert run_status(run).unanswered == unanswered
    assert main(["submit", "--status", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "job       12 train 1/2: FAILED code 3 (notes)" in printed
    assert all(f"no answer {why}" in printed for why in unanswered)


def test_a_job_that_was_killed_left_no_word(slurm: Slurm, run: Path) -> None:
    slurm(squeue=UNKNOWN_JOB, sacct=None, fails=("squeue",))
    line = {"event": "begin", "submission": "s", "job": "12", "step": 0}
    (run / "slurm" / "attempts.jsonl").write_text(json.dumps(line) + "\n")
    state, reason, source = told(run)[0]
    assert (state, source) == ("unknown", "notes") and "left no word" in reason


def test_a_sweep_tells_of_each_run_and_stops_each(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "sweep"
    for number, name in enumerate(("low", "high")):
        (base / name / "slurm").mkdir(parents=True)
        metrics = {"step": 10 * (number + 1), "loss": 2.0 + number, "step_time_ms": 100.0}
        (base / name / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        line = {"submission": "s", "job": f"12_{number}", "kind": "train", "link": 1, "links": 1, "runs": []}
        line["script"] = str(base / "slurm" / "s.sbatch")
        (base / name / "slurm" / "jobs.jsonl").write_text(json.dumps(line) + "\n")
    (base / "slurm").mkdir()
    runs = [str(base / name) for name in ("low", "high")]
    lines = [{**line, "job": "12", "runs": runs}, {**line, "job": "13", "kind": "evaluate"}]
    (base / "slurm" / "jobs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (base / "slurm" / "sweep-12_1.out").write_text("its log\n")
    slurm(squeue="12_0|RUNNING|None|n1\n12_1|PENDING|Resources|")
    status = run_status(base)
    assert [(run.step, run.loss, run.jobs[0]["state"]) for run in status.runs] == [
        (10, 2.0, "RUNNING"),
        (20, 3.0, "PENDING"),
    ]
    assert (status.jobs[0]["state"], status.jobs[0]["source"]) == ("1 RUNNING, 1 PENDING", "queue")
    assert run_status(base / "high").log == str(base / "slurm" / "sweep-12_1.out")
    assert main(["submit", "--status", str(base)]) == 0
    assert "sweep     high, PENDING\n  outcome   none yet\n  step      20, loss 3.0000" in capsys.readouterr().out
    # One of them: its own element is cancelled, no other.
    assert main(["submit", "--stop", str(base / "high"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cancelled"] == ["12_1"]
    assert (tmp_path / "bin" / "scancel.words").read_text().splitlines() == ["--state=PENDING", "12_1"]
    assert not (base / "low" / "stop").exists()
    assert main(["submit", "--stop", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stop"] == [str(base / name / "stop") for name in ("", "low", "high")]
    assert (base / "low" / "stop").exists()


def test_a_queue_that_does_not_answer_is_told_when_a_run_is_stopped(
    slurm: Slurm, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(squeue=NO_CONTROLLER, fails=("squeue",))
    assert main(["submit", "--stop", str(run)]) == 0
    assert "was not cancelled (squeue: " in capsys.readouterr().err
    assert (run / "stop").exists()
