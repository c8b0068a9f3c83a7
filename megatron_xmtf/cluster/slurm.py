"""Slurm's commands, each with the answer that is needed of it; no shell is between."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_xmtf.errors import ConfigError, MissingError

__all__ = [
    "Answer",
    "JobState",
    "cancel_pending",
    "has_slurm",
    "job_order",
    "job_states",
    "overriding_variables",
    "partition_limits",
    "submit_script",
    "test_script",
]

TIMEOUT_SECONDS = 60
"""Slurm's commands answer within seconds, or the controller is down."""


@dataclass(frozen=True)
class JobState:
    """What the queue, or the accounting, says of one job or element of an array."""

    job: str
    """12, 12_3, or 12_[4-9] of elements that wait together."""
    state: str
    """RUNNING, PENDING, COMPLETED, FAILED, TIMEOUT ..."""
    reason: str
    """Why it waits, where it runs, or how it ended."""
    source: Literal["queue", "accounting"]
    """Who says so: squeue, which forgets a job minutes after its end (MinJobAge), or sacct."""


@dataclass(frozen=True)
class Answer:
    """What Slurm says of jobs, and what it does not."""

    states: list[JobState]
    unanswered: list[str]
    """Whom nothing could be learned from, and why: "no Slurm on this machine", "sacct: ... storage is disabled"."""

    def of(self, job: str) -> list[JobState]:
        """Return the states of a job: of 12 those of its elements too, of 12_3 that one's."""
        return [state for state in self.states if job in (state.job, state.job.split("_")[0])]


def has_slurm() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def overriding_variables() -> list[str]:
    """Return the variables of this shell that sbatch puts before what a script says (sbatch(1), INPUT ENVIRONMENT)."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


def submit_script(script: Path, *, arguments: Sequence[str] = (), dependency: str | None = None) -> str:
    """Submit a script in its own directory and return the number of the job.

    Args:    arguments: words that the script finds in $1 and on. dependency: as in --dependency; a job whose dependency
             can never be fulfilled is cancelled.
    Raises:  MissingError: no sbatch here. ConfigError: Slurm refuses; its own words.
    """
    options = ["--parsable"]
    if dependency is not None:
        options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    told = _run(["sbatch", *options, script.name, *arguments], directory=script.parent)
    if told.returncode:
        raise ConfigError(f"Slurm refuses {script}: {_words(told)}")
    return told.stdout.strip().split(";")[0]  # NUMBER;CLUSTER


def test_script(text: str, *, directory: Path) -> tuple[bool, str]:
    """Ask Slurm whether it would take a script; nothing is submitted.

    Returns: whether it would, and its words: when and where the job could start, or what is wrong.
    """
    told = _run(["sbatch", "--test-only"], directory=directory, text=text)
    return told.returncode == 0, _words(told)


def partition_limits(partition: str | None) -> tuple[int, str] | None:
    """Return nodes and time limit of a partition (None: the default one); None where Slurm knows no such partition."""
    told = _run(["sinfo", "--noheader", "--format=%P|%D|%l", *(["--partition", partition] if partition else [])])
    found = None
    if told.returncode:
        raise ConfigError(f"sinfo: {_words(told)}; Slurm cannot be asked from here.")
    for line in told.stdout.splitlines():
        name, nodes, limit = line.split("|")
        if (partition is None and name.endswith("*")) or name.rstrip("*") == partition:
            found = (int(nodes) + (found[0] if found else 0), limit)
    return found


def job_states(jobs: Sequence[str]) -> Answer:
    """Ask the queue for jobs, and the accounting for those that the queue has forgotten.

    Args:  jobs: numbers, 12 or 12_3. Jobs that nobody knows any more are left out of the answer.
    """
    numbers = sorted({job.split("_")[0] for job in jobs}, key=int)
    if not numbers:
        return Answer([], [])
    if not has_slurm():
        return Answer([], ["no Slurm on this machine"])
    # These jobs alone: a controller with ten thousand others is not to tell of all of them.
    words = ["--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N", f"--jobs={','.join(numbers)}"]
    told, unanswered = _ask(["squeue", *words])
    found = []
    for line in told:
        job, state, reason, nodes = line.split("|", 3)
        found.append(JobState(job, state, nodes or ("" if reason == "None" else reason), "queue"))
    # Of an array the queue forgets the elements one by one.
    known = {state.job for state in found}
    missing = [number for number in numbers if number not in known]
    if missing:
        words = ["-n", "-P", "-X", f"--jobs={','.join(missing)}", "--format=JobID,State,ExitCode,NodeList"]
        told, more = _ask(["sacct", *words])
        unanswered += more
        for line in told:
            job, state, code, nodes = line.split("|", 3)
            if job not in known and "[" not in job:  # 12_[3-9]: elements that wait; the queue has told of each
                # CANCELLED by 1000 -> CANCELLED; a code is STATUS:SIGNAL
                found.append(JobState(job, state.split()[0], f"exit {code} on {nodes}", "accounting"))
    return Answer(sorted(found, key=lambda state: job_order(state.job)), unanswered)


def cancel_pending(jobs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cancel those of the jobs that wait; what runs is left alone.

    Returns: what was cancelled, as it was named in `jobs`; and who could not be asked.
    """
    answer = job_states(jobs)
    waiting = [job for job in dict.fromkeys(jobs) if any(state.state == "PENDING" for state in answer.of(job))]
    if waiting:
        told = _run(["scancel", "--state=PENDING", *waiting])
        if told.returncode:
            raise ConfigError(f"scancel {' '.join(waiting)}: {_words(told)}")
    return waiting, [why for why in answer.unanswered if not why.startswith("sacct")]


def _ask(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command's lines, or why there are none; a job that it does not know is no failure."""
    if shutil.which(command[0]) is None:
        return [], [f"{command[0]}: not on this machine"]
    try:
        told = _run(command)
    except ConfigError as error:
        return [], [str(error)]
    if told.returncode == 0:
        return told.stdout.splitlines(), []
    words = _words(told)
    return [], [] if "Invalid job id specified" in words else [f"{command[0]}: {words}"]


def job_order(job: str) -> tuple[int, int]:
    """Return what sorts jobs, and the elements of an array, by number."""
    number, _, element = job.partition("_")
    return int(number), int(element) if element else -1


def _environment() -> dict[str, str]:
    """Return this shell's variables without those of a job that it may be in.

    sbatch hands them on to the next job, where those that it does not set itself would be believed:
    SLURM_CPUS_PER_TASK, SLURM_RESTART_COUNT, SLURM_ARRAY_JOB_ID.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in kept}


def _words(told: subprocess.CompletedProcess[str]) -> str:
    lines = (told.stderr.strip() or told.stdout.strip()).splitlines()
    return (
        "; ".join(re.sub(r"^(sbatch|scancel|sinfo|squeue|sacct): (error: )?", "", line) for line in lines)
        or f"exit {told.returncode}"
    )


def _run(
    command: Sequence[str], *, directory: Path | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=directory,
            input=text,
            env=_environment(),
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise MissingError(
            f"{command[0]} is not on this machine: submit on a login node of the cluster (--dry-run needs no Slurm)."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]} has not answered for {TIMEOUT_SECONDS} s: Slurm's controller is down or busy; try again."
        ) from error
