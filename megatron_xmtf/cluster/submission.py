"""Put jobs into the queue: one, a chain, or an array; and leave a note of each in the run directory.

    OUT/slurm/S-train.sbatch   the script           S: the submission, 20261130-093012-1a2b
    OUT/slurm/S-train.yaml     the configuration that it runs, resolved; later edits of the user's do not reach it
    OUT/slurm/NAME-12.out      the log of job 12
    OUT/slurm/ended-12         the exit code of job 12, where it ran a verb; attempts.jsonl has those of runs
    OUT/slurm/jobs.jsonl       what was submitted; of a sweep also in OUT/NAME/slurm, as 12_3

A chain is N jobs of one script. Each but the first waits for the one before with `afternotok`: where that ends the run,
the rest are never started. What waits for a chain waits for any of its jobs to end well.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.cluster.attempts import SLURM_DIRECTORY
from megatron_xmtf.cluster.render import TrainingRun
from megatron_xmtf.cluster.slurm import submit_script
from megatron_xmtf.config.load import write_config
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import atomic_write

__all__ = ["JOBS", "Submitted", "after_all", "new_submission", "planned_runs", "submit", "write_runs"]

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """Jobs that are in the queue now."""

    submission: str
    script: Path
    jobs: list[str]
    """Numbers; the links of a chain in order."""
    wait_for: str
    """What a job gives --after to wait until this one has ended well: 12, or 12?13?14 of a chain."""


def new_submission() -> str:
    """Name a submission by the time, and a few letters against two in one second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def planned_runs(configs: Sequence[RunConfig], *, submission: str) -> list[TrainingRun]:
    """Name the configuration and the directory of each run; nothing is written."""
    outputs = [Path(config.output).absolute() for config in configs]
    return [TrainingRun(output / SLURM_DIRECTORY / f"{submission}-train.yaml", output) for output in outputs]


def write_runs(configs: Sequence[RunConfig], runs: Sequence[TrainingRun]) -> None:
    """Write the resolved configuration of each run where the job reads it."""
    for config, run in zip(configs, runs, strict=True):
        write_config(config, run.config)


def after_all(words: Sequence[str]) -> str | None:
    """Return Slurm's dependency on jobs that must have ended well; None: on none.

    ["12", "14"]   ->  afterok:12:14
    ["15?16"]      ->  afterok:15?afterok:16     a chain: whichever of its jobs ends the run

    Raises:  ConfigError: no number; a chain beside other jobs.
    """
    if not words:
        return None
    for word in words:
        if not all(part.isdigit() for part in word.split("?")):
            raise ConfigError(f"--after {word}: the number of a job is needed, or of a chain's, as in 15?16.")
    if len(words) > 1 and any("?" in word for word in words):
        raise ConfigError(
            f"--after {' '.join(words)}: Slurm cannot wait for any of a chain and for other jobs; wait for the chain "
            "alone, and let it wait for the others."
        )
    if "?" in words[0]:
        return "?".join(f"afterok:{part}" for part in words[0].split("?"))
    return f"afterok:{':'.join(words)}"


def submit(
    text: str,
    *,
    directory: Path,
    submission: str,
    kind: str,
    output: Path,
    elements: Sequence[Path] = (),
    links: int = 1,
    after: Sequence[str] = (),
) -> Submitted:
    """Write a script and submit it, `links` times as a chain.

    Args:    directory: of script and logs. kind: train, or the verb. output: the run directory whose notes tell of it.
             elements: run directories of an array's elements, noted in each with its own number.
             after: see `after_all`.
    Raises:  ConfigError: Slurm refuses; what was submitted before stays in the queue, and is named.
    """
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / f"{submission}-{kind}.sbatch"
    with atomic_write(script) as stream:
        stream.write(text)
    jobs: list[str] = []
    dependency = after_all(after)
    for link in range(1, links + 1):
        arguments = [str(link), str(links)] if links > 1 else []
        try:
            job = submit_script(script, arguments=arguments, dependency=dependency)
        except ConfigError as error:
            left = f" Of the chain, jobs {' '.join(jobs)} are in the queue (scancel takes them out)." if jobs else ""
            raise ConfigError(f"{error}{left}") from error
        jobs.append(job)
        line: dict[str, Any] = {"submission": submission, "job": job, "kind": kind, "script": str(script)}
        line |= {"link": link, "links": links, "dependency": dependency}
        _note(output, {**line, "runs": list(map(str, elements))})
        for number, element in enumerate(elements):
            _note(element, {**line, "job": f"{job}_{number}", "runs": []})
        dependency = f"afternotok:{job}"
    return Submitted(submission=submission, script=script, jobs=jobs, wait_for="?".join(jobs))


def _note(output: Path, line: dict[str, Any]) -> None:
    directory = output / SLURM_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / JOBS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({**line, "time": round(time.time(), 1)}) + "\n")
