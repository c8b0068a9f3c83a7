"""How a run on a cluster is: jobs, attempts, newest loss; told from files, and from Slurm where it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.cluster.attempts import ATTEMPTS, SLURM_DIRECTORY, STATUS, newest_step, read_lines
from megatron_xmtf.cluster.slurm import JobState, cancel_pending, job_states
from megatron_xmtf.cluster.submission import JOBS
from megatron_xmtf.config.load import load_yaml
from megatron_xmtf.errors import MissingError
from megatron_xmtf.files import read_json, require_directory

__all__ = ["RunStatus", "run_status", "stop_run"]

RECENT_STEPS = 20
"""Steps whose mean time the estimate of what is left takes."""
TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run."""

    output: str
    outcome: dict[str, Any] | None
    """OUT/status.json; None: it runs, waits, or never ran."""
    step: int
    train_steps: int | None
    loss: float | None
    seconds_since_step: float | None
    """Since the last line of metrics.jsonl was written."""
    seconds_left: float | None
    """At the pace of the last steps, waiting in queues not counted."""
    checkpoint_step: int
    """0: none."""
    attempts: int
    last_decision: str | None
    """What followed the last attempt, and why."""
    jobs: list[dict[str, Any]]
    """What was submitted, with the state that Slurm tells; the newest last."""
    log: str | None
    """The newest log."""

    def to_mapping(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)

    def table(self) -> str:
        """Return it as text."""
        lines = [f"run       {self.output}"]
        outcome = self.outcome
        said = "none yet" if outcome is None else f"{outcome['name']}: {outcome['message'].splitlines()[0]}"
        lines.append(f"outcome   {said}")
        if self.loss is not None:
            of = f" of {self.train_steps}" if self.train_steps else ""
            lines.append(f"step      {self.step}{of}, loss {self.loss:.4f}, {_ago(self.seconds_since_step)}")
        if self.seconds_left is not None and outcome is None:
            lines.append(f"left      {self.seconds_left / 3600:.1f} hours at this pace")
        lines.append(f"saved     step {self.checkpoint_step}" if self.checkpoint_step else "saved     nothing yet")
        lines.append(f"attempts  {self.attempts}" + (f"; {self.last_decision}" if self.last_decision else ""))
        for job in self.jobs:
            link = f" {job['link']}/{job['links']}" if job["links"] > 1 else ""
            lines.append(f"job       {job['job']} {job['kind']}{link}: {job['state']} {job['reason']}".rstrip())
        if self.log is not None:
            lines.append(f"log       {self.log}")
        return "\n".join(lines)


def run_status(output: Path | str) -> RunStatus:
    """Gather what is known of a run.

    Raises:  MissingError: no run directory.
    """
    output = require_directory(output)
    directory = output / SLURM_DIRECTORY
    if not directory.is_dir() and not (output / STATUS).is_file() and not (output / "metrics.jsonl").is_file():
        raise MissingError(f"{output} is no run directory: neither {STATUS} nor metrics.jsonl nor slurm/ is in it.")
    submitted = read_lines(directory / JOBS)
    attempts = read_lines(directory / ATTEMPTS)
    metrics = _last_metrics(output / "metrics.jsonl")
    steps = _train_steps(output)
    last = metrics[-1] if metrics else {}
    pace = sum(line["step_time_ms"] for line in metrics) / len(metrics) / 1000 if metrics else None
    ended = [line for line in attempts if line["event"] == "end"]
    logs = sorted(directory.glob("*.out"), key=lambda path: path.stat().st_mtime) if directory.is_dir() else []
    return RunStatus(
        output=str(output),
        outcome=read_json(output / STATUS) if (output / STATUS).is_file() else None,
        step=int(last.get("step", 0)),
        train_steps=steps,
        loss=last.get("loss"),
        seconds_since_step=time.time() - (output / "metrics.jsonl").stat().st_mtime if metrics else None,
        seconds_left=None if pace is None or steps is None else pace * (steps - int(last["step"])),
        checkpoint_step=newest_step(output),
        attempts=sum(line["event"] == "begin" for line in attempts),
        last_decision=f"{ended[-1]['decision']}: {ended[-1]['why'].splitlines()[0]}" if ended else None,
        jobs=[_with_state(line, states) for states in [_states(submitted)] for line in submitted],
        log=str(logs[-1]) if logs else None,
    )


def stop_run(output: Path | str) -> list[str]:
    """Ask a run to save and end, for good: write OUT/stop, and cancel those of its jobs that wait.

    Returns: the numbers of the jobs that were cancelled.
    """
    output = require_directory(output)
    (output / "stop").touch()
    return cancel_pending([line["job"] for line in read_lines(output / SLURM_DIRECTORY / JOBS)])


def _states(submitted: list[dict[str, Any]]) -> dict[str, list[JobState]]:
    found: dict[str, list[JobState]] = {}
    for state in job_states([line["job"] for line in submitted]):
        found.setdefault(state.job.split("_")[0], []).append(state)
    return found


def _with_state(line: Mapping[str, Any], states: Mapping[str, list[JobState]]) -> dict[str, Any]:
    """Add a job's state; the elements of an array are counted by theirs: "3 COMPLETED, 1 RUNNING"."""
    known = states.get(line["job"], [])
    if len(known) == 1:
        state, reason = known[0].state, known[0].reason
    else:
        names = [state.state for state in known]
        state = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "no longer in the queue"
        reason = ""
    return {**line, "state": state, "reason": reason}


def _last_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the last steps; of a long file the end alone is read."""
    if not path.is_file():
        return []
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    found = []
    for line in text.splitlines()[-RECENT_STEPS - 1 :]:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the first one may be cut by the window, the last one is being written
    return [line for line in found if "step_time_ms" in line][-RECENT_STEPS:]


def _train_steps(output: Path) -> int | None:
    path = output / "config.yaml"
    values = load_yaml(path) if path.is_file() else {}
    steps = values.get("schedule", {}).get("train_steps") if isinstance(values, dict) else None
    return int(steps) if steps else None


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} minutes ago"
