"""Count the starts of a job, and decide after each whether it goes back into the queue.

    OUT/slurm/attempts.jsonl
    {"event": "begin", "submission": "S", "job": "12", "restart": 0, "step": 0,  "nodes": "n[1-2]", "time": ...}
    {"event": "end",   "submission": "S", "job": "12", "code": 3, "step": 40, "decision": "requeue", "why": ...}
    {"event": "begin", "submission": "S", "job": "12", "restart": 1, "step": 40, ...}

A begin without an end was killed: its node was lost, or its time was over before it had saved. It counts all the same,
so a job that comes back again and again from one checkpoint is refused, whatever ends it. The outcome of a run is what
OUT/status.json says; launchers collapse their workers' exit codes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.checkpoint.directory import list_checkpoints
from megatron_xmtf.errors import ExitCode
from megatron_xmtf.files import read_json

__all__ = ["SLURM_DIRECTORY", "STATUS", "Decision", "Limits", "begin_attempt", "end_attempt", "read_lines"]

SLURM_DIRECTORY = "slurm"
"""In the run directory: scripts, logs, what was submitted, attempts."""
ATTEMPTS = "attempts.jsonl"
STATUS = "status.json"


@dataclass(frozen=True)
class Limits:
    """How often a run is started again, and after what."""

    without_progress: int
    """Starts in a row from one checkpoint."""
    in_all: int | None
    """Starts of one submission."""
    requeue_on: tuple[str, ...]
    """Of requeue, hang, failed; empty: never."""


@dataclass(frozen=True)
class Decision:
    """What the script does next: train, requeue, or end with `code`; "done" and "stop" end it, "leave" lets Slurm."""

    word: str
    code: int
    why: str

    def __str__(self) -> str:
        return f"{self.word} {self.code}"


def begin_attempt(
    output: Path, *, submission: str, limits: Limits, environment: Mapping[str, str] = os.environ
) -> Decision:
    """Decide whether to train, count the attempt, and set the status of the attempt before aside.

    Args:    output: the run directory; made where it is not there yet.
    Returns: train, or how the job ends without it: done, where nothing is left to do.
    """
    step = newest_step(output)
    status = _status(output)
    if _is_complete(status):
        return Decision("done", 0, f"{output} is trained to its last step already")
    if (output / "stop").exists():
        return Decision("stop", int(ExitCode.USER), f"{output / 'stop'} is there: the run is not to go on")
    begun = [line for line in _attempts(output, submission) if line["event"] == "begin"]
    if limits.in_all is not None and len(begun) >= limits.in_all:
        return Decision("stop", _last_code(status), f"started {len(begun)} times, slurm.max_attempts={limits.in_all}")
    same = _starts_in_a_row(begun, step)
    if same >= limits.without_progress:
        why = (
            f"started {same} times from step {step} without a new checkpoint "
            f"(slurm.max_attempts_without_progress={limits.without_progress}); the last outcome: "
            f"{status.get('message', 'none was written')}"
        )
        return Decision("stop", _last_code(status), why)
    if status:
        os.replace(output / STATUS, _directory(output) / "previous_status.json")
    values = {"job": _job(environment), "restart": int(environment.get("SLURM_RESTART_COUNT") or 0), "step": step}
    _append(output, {"event": "begin", "submission": submission, **values, "nodes": _nodes(environment)})
    return Decision("train", 0, f"attempt {len(begun) + 1}, from step {step}")


def end_attempt(
    output: Path,
    *,
    submission: str,
    launcher_code: int,
    limits: Limits,
    told_to_stop: bool = False,
    is_cancelled: bool = False,
    link: int = 1,
    links: int = 1,
    environment: Mapping[str, str] = os.environ,
) -> Decision:
    """Decide what follows an attempt, and note it.

    Args:  launcher_code: exit code of srun, which is only told: with one rank that fails it is that of those it killed.
           told_to_stop: the script has heard a signal; ranks that were still starting die of it without a word.
           is_cancelled: Slurm ends the script itself (scancel, its time, preemption past the grace), and decides
           whether the job comes back.
           link, links: place in a chain of jobs; all but the last leave it to the next one to go on.
    """
    outcome = _outcome(output, launcher_code, told_to_stop=told_to_stop)
    decision = _decide(output, submission, outcome, limits, is_last_link=link >= links)
    if is_cancelled and decision.word == "requeue":
        decision = Decision("leave", decision.code, f"{outcome['message']}; Slurm ends this job by itself")
    values = {"job": _job(environment), "step": newest_step(output)}
    decided = {"code": decision.code, "decision": decision.word, "why": decision.why}
    _append(output, {"event": "end", "submission": submission, **values, **decided})
    return decision


def newest_step(output: Path) -> int:
    """Return the step of the newest finished checkpoint, 0 without one."""
    checkpoints = output / "checkpoints"
    return max((step for step, _ in list_checkpoints(checkpoints)), default=0) if checkpoints.is_dir() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; one that was cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _outcome(output: Path, launcher_code: int, *, told_to_stop: bool) -> dict[str, Any]:
    """Return the status that the run left, or what it must have been."""
    status = _status(output)
    if status:
        return status
    if told_to_stop:
        return {"exit_code": int(ExitCode.REQUEUE), "message": "told to stop before the first step"}
    return {
        "exit_code": int(ExitCode.FAILED),
        "message": f"the ranks ended without a word (the launcher with {launcher_code}); the log has their errors",
    }


def _decide(
    output: Path, submission: str, outcome: Mapping[str, Any], limits: Limits, *, is_last_link: bool
) -> Decision:
    code, message = int(outcome["exit_code"]), str(outcome["message"])
    if _is_complete(outcome):
        return Decision("done", 0, message)
    if code == ExitCode.DONE:
        # Stopped by its stop file: what depends on a finished run must not start.
        return Decision("stop", int(ExitCode.FAILED), message)
    names = {ExitCode.REQUEUE: "requeue", ExitCode.HANG: "hang", ExitCode.FAILED: "failed"}
    if names.get(ExitCode(code)) not in limits.requeue_on:
        return Decision("stop", code, f"{message}; not started again after this")
    begun = [line for line in _attempts(output, submission) if line["event"] == "begin"]
    if limits.in_all is not None and len(begun) >= limits.in_all:
        return Decision("stop", code, f"{message}; started {len(begun)} times, slurm.max_attempts={limits.in_all}")
    step = newest_step(output)
    same = _starts_in_a_row(begun, step)
    if same >= limits.without_progress:
        rule = f"slurm.max_attempts_without_progress={limits.without_progress}"
        return Decision("stop", code, f"{message}; started {same} times from step {step} without progress ({rule})")
    if not is_last_link:
        return Decision("stop", code, f"{message}; the next job of the chain goes on")
    return Decision("requeue", code, message)


def _starts_in_a_row(begun: Sequence[Mapping[str, Any]], step: int) -> int:
    """Return how many of the last starts began at `step`.

    begins at 0, 40, 60, 60 and step 60 -> 2; and step 80 -> 0
    """
    count = 0
    for line in reversed(begun):
        if line["step"] != step:
            break
        count += 1
    return count


def _status(output: Path) -> dict[str, Any]:
    path = output / STATUS
    return dict(read_json(path)) if path.is_file() else {}


def _is_complete(status: Mapping[str, Any]) -> bool:
    return status.get("exit_code") == ExitCode.DONE and status.get("step", -1) >= status.get("train_steps", 0)


def _last_code(status: Mapping[str, Any]) -> int:
    return int(status.get("exit_code") or ExitCode.FAILED)


def _attempts(output: Path, submission: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(_directory(output) / ATTEMPTS) if line.get("submission") == submission]


def _append(output: Path, line: Mapping[str, Any]) -> None:
    """Add one line; a single write, so that a reader sees all of it or nothing."""
    with open(_directory(output) / ATTEMPTS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({**line, "time": round(time.time(), 1)}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _directory(output: Path) -> Path:
    directory = output / SLURM_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _job(environment: Mapping[str, str]) -> str:
    """Return the name that Slurm's commands have for this job: 12, or 12_3 of an array."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment.get("SLURM_JOB_ID", "")


def _nodes(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_JOB_NODELIST", "")
