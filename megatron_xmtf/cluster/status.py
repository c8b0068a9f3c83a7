"""How a run on a cluster is: jobs, attempts, newest loss; told from files, and from Slurm where it answers.

What a job came to is told by the first of these that knows it, and which one that was is said beside it:

    queue        squeue; it forgets a job some minutes after its end (MinJobAge, 300 s)
    accounting   sacct, where the cluster has it
    notes        OUT/slurm/attempts.jsonl of a run, OUT/slurm/ended-12 of a verb: written by the job itself
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_xmtf.cluster.attempts import ATTEMPTS, SLURM_DIRECTORY, STATUS, newest_step, read_lines
from megatron_xmtf.cluster.slurm import Answer, cancel_pending, job_order, job_states
from megatron_xmtf.cluster.submission import JOBS
from megatron_xmtf.config.load import load_yaml
from megatron_xmtf.errors import MissingError
from megatron_xmtf.files import read_json, require_directory

__all__ = ["RunStatus", "Stopped", "run_status", "stop_run"]

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
    """What was submitted, each with `state`, `reason` and `source` (queue, accounting, notes; None: nobody knows);
    the newest last."""
    log: str | None
    """The newest log."""
    unanswered: list[str] = field(default_factory=list)
    """Whom nothing could be learned from, and why."""
    runs: list[RunStatus] = field(default_factory=list)
    """Those of the newest sweep."""

    def to_mapping(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)

    def table(self) -> str:
        """Return it as text."""
        lines = [f"run       {self.output}"]
        if not self.runs:
            lines += self._progress()
        for run in self.runs:
            state = f", {run.jobs[-1]['state']}" if run.jobs else ""
            lines += [f"sweep     {Path(run.output).name}{state}", *(f"  {line}" for line in run._progress())]
        for job in self.jobs:
            link = f" {job['link']}/{job['links']}" if job["links"] > 1 else ""
            told = f"{job['state']} {job['reason']}".rstrip() + (f" ({job['source']})" if job["source"] else "")
            lines.append(f"job       {job['job']} {job['kind']}{link}: {told}")
        lines += [f"no answer {why}" for why in self.unanswered]
        if self.log is not None:
            lines.append(f"log       {self.log}")
        return "\n".join(lines)

    def _progress(self) -> list[str]:
        said = "none yet"
        if self.outcome is not None:
            said = f"{self.outcome['name']}: {self.outcome['message'].splitlines()[0]}"
        lines = [f"outcome   {said}"]
        if self.loss is not None:
            of = f" of {self.train_steps}" if self.train_steps else ""
            lines.append(f"step      {self.step}{of}, loss {self.loss:.4f}, {_ago(self.seconds_since_step)}")
        if self.seconds_left is not None and self.outcome is None:
            lines.append(f"left      {self.seconds_left / 3600:.1f} hours at this pace")
        lines.append(f"saved     step {self.checkpoint_step}" if self.checkpoint_step else "saved     nothing yet")
        lines.append(f"attempts  {self.attempts}" + (f"; {self.last_decision}" if self.last_decision else ""))
        return lines


@dataclass(frozen=True)
class Stopped:
    """What `stop_run` has done."""

    stop: list[str]
    """Files that ask a run to end: one, or one for each run of a sweep as well."""
    cancelled: list[str]
    """Jobs that waited."""
    unanswered: list[str]
    """Whom the queue could not be learned from: what waits there was left in it."""


def run_status(output: Path | str) -> RunStatus:
    """Gather what is known of a run.

    Raises:  MissingError: no run directory.
    """
    output = require_directory(output)
    directory = output / SLURM_DIRECTORY
    if not directory.is_dir() and not (output / STATUS).is_file() and not (output / "metrics.jsonl").is_file():
        raise MissingError(f"{output} is no run directory: neither {STATUS} nor metrics.jsonl nor slurm/ is in it.")
    submitted = read_lines(directory / JOBS)
    answer = job_states([line["job"] for line in submitted])
    newest = [line for line in submitted if line["kind"] == "train"][-1:]
    runs = [_gather(path, read_lines(path / SLURM_DIRECTORY / JOBS), answer) for path in _runs(newest)]
    return _gather(output, submitted, answer, runs=runs)


def stop_run(output: Path | str) -> Stopped:
    """Ask a run, or all of a sweep, to save and end, for good: write OUT/stop, and cancel those jobs that wait."""
    output = require_directory(output)
    submitted = read_lines(output / SLURM_DIRECTORY / JOBS)
    files = [path / "stop" for path in (output, *_runs(submitted))]
    for path in files:
        path.touch()
    cancelled, unanswered = cancel_pending([line["job"] for line in submitted])
    return Stopped(list(map(str, files)), cancelled, unanswered)


def _runs(submitted: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Return the directories of the runs of sweeps."""
    paths = dict.fromkeys(Path(path) for line in submitted for path in line.get("runs", ()))
    return [path for path in paths if path.is_dir()]


def _gather(
    output: Path, submitted: Sequence[Mapping[str, Any]], answer: Answer, *, runs: Sequence[RunStatus] = ()
) -> RunStatus:
    """Read the files of one run directory, and put beside its jobs what Slurm says."""
    attempts = read_lines(output / SLURM_DIRECTORY / ATTEMPTS)
    of_elements = [line for path in _runs(submitted) for line in read_lines(path / SLURM_DIRECTORY / ATTEMPTS)]
    metrics = _last_metrics(output / "metrics.jsonl")
    steps = _train_steps(output)
    last = metrics[-1] if metrics else {}
    pace = sum(line["step_time_ms"] for line in metrics) / len(metrics) / 1000 if metrics else None
    ended = [line for line in attempts if line["event"] == "end"]
    jobs = [_with_state(line, answer, [*attempts, *of_elements]) for line in submitted]
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
        jobs=jobs,
        log=_newest_log(output, submitted),
        # Whoever keeps silent is of interest only where a job's state is not known from the queue.
        unanswered=answer.unanswered if any(not job["source"] or "notes" in job["source"] for job in jobs) else [],
        runs=list(runs),
    )


def _newest_log(output: Path, submitted: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the newest log: of a sweep's run it lies with the sweep's script."""
    logs = list((output / SLURM_DIRECTORY).glob("*.out"))
    for line in submitted:
        logs += Path(line.get("script", output)).parent.glob(f"*-{line['job']}.out")
    return str(max(logs, key=lambda path: path.stat().st_mtime)) if logs else None


def _with_state(line: Mapping[str, Any], answer: Answer, attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add a job's state, and who tells it; the elements of an array are counted by theirs: "3 COMPLETED, 1 RUNNING"."""
    by_name = _noted(line, attempts)
    by_name.update({one.job: (one.state, one.reason, one.source) for one in answer.of(line["job"])})
    told = [by_name[name] for name in sorted(by_name, key=job_order)]
    if len(told) == 1:
        ((state, reason, source),) = told
    else:
        names = [state for state, _, _ in told]
        state = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "unknown"
        reason = "" if told else "neither the queue nor the accounting nor its own notes tell of it"
        source = ", ".join(dict.fromkeys(source for _, _, source in told))
    return {**line, "state": state, "reason": reason, "source": source or None}


def _noted(line: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Return what a job, or each element of an array, has left of itself: name -> state, reason, source."""
    found = {}
    words = {"done": "COMPLETED", "requeue": "REQUEUED", "leave": "ENDED BY SLURM"}
    for each in attempts:
        job = each["job"]
        if line["job"] not in (job, job.split("_")[0]):
            continue
        if each["event"] == "begin":
            found[job] = ("unknown", "it began, and left no word: killed, its node lost, or its time over", "notes")
        else:
            found[job] = (words.get(each["decision"], "FAILED"), f"code {each['code']}", "notes")
    directory, name = Path(line.get("script", ".")).parent, f"ended-{line['job']}"
    for path in (*directory.glob(name), *directory.glob(f"{name}_*")):
        code = path.read_text(encoding="utf-8").strip()
        state = "COMPLETED" if code == "0" else "FAILED"
        found[path.name.removeprefix("ended-")] = (state, f"code {code or 'not written'}", "notes")
    return found


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
