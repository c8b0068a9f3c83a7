"""Slurm's commands, each with the answer that is needed of it; no shell is between."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xmtf.errors import ConfigError, MissingError

__all__ = ["JobState", "cancel_pending", "has_slurm", "job_states", "partition_limits", "submit_script", "test_script"]

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
    """Why it waits, or where it runs."""


def has_slurm() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


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


def job_states(jobs: Sequence[str]) -> list[JobState]:
    """Return what the queue knows of jobs, also of those that ended in the last minutes, and of older ones sacct.

    Args:  jobs: numbers. Jobs that nobody knows any more are left out.
    """
    if not jobs or not has_slurm():
        return []
    told = _run(["squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%N"])
    found = []
    for line in told.stdout.splitlines() if told.returncode == 0 else []:
        job, state, reason, nodes = line.split("|")
        if job.split("_")[0] in jobs:
            found.append(JobState(job, state, nodes or ("" if reason == "None" else reason)))
    missing = sorted(set(jobs) - {state.job.split("_")[0] for state in found}, key=int)
    return sorted([*_accounted(missing), *found], key=lambda state: _order(state.job))


def cancel_pending(jobs: Sequence[str]) -> list[str]:
    """Cancel those of the jobs that wait, and return their numbers; what runs is left alone."""
    waiting = [state.job for state in job_states(jobs) if state.state == "PENDING"]
    numbers = sorted({job.split("_")[0] for job in waiting}, key=int)
    if numbers:
        told = _run(["scancel", "--state=PENDING", *numbers])
        if told.returncode:
            raise ConfigError(f"scancel {' '.join(numbers)}: {_words(told)}")
    return numbers


def _accounted(jobs: Sequence[str]) -> list[JobState]:
    """Ask the accounting, which many clusters do not have, or not for everybody."""
    if not jobs or shutil.which("sacct") is None:
        return []
    told = _run(["sacct", "-n", "-P", "-X", f"--jobs={','.join(jobs)}", "--format=JobID,State,ExitCode,NodeList"])
    found = []
    for line in told.stdout.splitlines() if told.returncode == 0 else []:
        job, state, code, nodes = line.split("|")
        found.append(JobState(job, state.split()[0], f"exit {code} on {nodes}"))
    return found


def _order(job: str) -> tuple[int, int]:
    number, _, element = job.partition("_")
    found = re.match(r"\[?(\d+)", element)
    return int(number), int(found[1]) if found else -1


def _words(told: subprocess.CompletedProcess[str]) -> str:
    lines = (told.stderr.strip() or told.stdout.strip()).splitlines()
    return (
        "; ".join(re.sub(r"^(sbatch|scancel|sinfo): (error: )?", "", line) for line in lines)
        or f"exit {told.returncode}"
    )


def _run(
    command: Sequence[str], *, directory: Path | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=directory, input=text, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise MissingError(
            f"{command[0]} is not on this machine: submit on a login node of the cluster (--dry-run needs no Slurm)."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]} has not answered for {TIMEOUT_SECONDS} s: Slurm's controller is down or busy; try again."
        ) from error
