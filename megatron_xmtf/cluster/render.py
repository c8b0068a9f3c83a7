"""Render job scripts from the templates in `slurm/`.

    directives()      #SBATCH lines; no shell reads them, so they hold names from an allow-list alone
    render_train()    slurm/train.sbatch     ranks, signals, requeue; one run, or an array of runs
    render_commands() slurm/command.sbatch   one verb, or an array of them

Every `{{ value }}` of a template is quoted for the shell unless it is `Shell` already; paths stay out of #SBATCH lines:
a script is submitted in its own directory, where the logs go, and changes to the working directory by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

import megatron_xmtf
from megatron_xmtf.cluster.container import inside_words, srun_options
from megatron_xmtf.cluster.shell import Shell, join, quote
from megatron_xmtf.config.slurm import SlurmConfig

__all__ = ["ArrayShape", "TrainingRun", "directives", "render_commands", "render_train", "templates_directory"]

LAUNCH = ("--kill-on-bad-exit=1", "--wait=60")
"""One rank that fails ends the step, and so does one that leaves 60 s before the others: BLOOM's scripts, as jobs that
hung after a crash cost it days."""


@dataclass(frozen=True)
class TrainingRun:
    """One run of a training job."""

    config: Path
    """The resolved configuration that the job reads each time it starts."""
    output: Path
    """The run directory."""


@dataclass(frozen=True)
class ArrayShape:
    """How an array job is numbered."""

    size: int
    max_running: int | None = None
    """Elements that may run at once."""


def templates_directory() -> Path:
    """Return where the templates are: inside an installed package, beside it in a checkout."""
    package = Path(megatron_xmtf.__file__).parent
    installed = package / "slurm"
    return installed if installed.is_dir() else package.parent / "slurm"


def render_train(
    runs: Sequence[TrainingRun],
    *,
    slurm: SlurmConfig,
    job_name: str,
    working_directory: Path,
    submission: str,
    max_running: int | None = None,
) -> str:
    """Render the script of a training job, or of an array of them.

    Args:    working_directory: what relative paths of configurations start from. submission: names this submission;
             its attempts are counted together.
    Raises:  ConfigError: a path that no script can carry.
    """
    shape = ArrayShape(len(runs), max_running) if len(runs) > 1 else None
    tasks, cpus = slurm.ranks, slurm.cpus_per_rank
    if slurm.launcher == "torchrun":
        tasks, cpus = 1, None if cpus is None else cpus * slurm.ranks
    limits = [
        *("--max-attempts-without-progress", str(slurm.max_attempts_without_progress)),
        *(("--max-attempts", str(slurm.max_attempts)) if slurm.max_attempts else ()),
        *(("--requeue-on", *slurm.requeue_on) if slurm.requeue and slurm.requeue_on else ()),
    ]
    lines = directives(slurm, job_name=job_name, nodes=slurm.nodes, tasks_per_node=tasks, cpus=cpus, array=shape)
    lines.append(f"#SBATCH --signal=B:USR1@{slurm.signal_seconds}")
    inside = srun_options(slurm, working_directory=working_directory)
    return _render(
        "train.sbatch",
        slurm,
        working_directory,
        directives=Shell("\n".join(lines)),
        runs=[{"config": str(run.config), "output": str(run.output)} for run in runs],
        limits=join(limits),
        submission=submission,
        torchrun=slurm.launcher == "torchrun",
        ranks_per_node=slurm.ranks,
        srun=join([*LAUNCH, *_step_size(slurm.nodes, tasks, cpus), *inside]),
    )


def render_commands(
    commands: Sequence[Sequence[str]],
    *,
    slurm: SlurmConfig,
    job_name: str,
    working_directory: Path,
    nodes: int = 1,
    uses_gpus: bool = False,
    max_running: int | None = None,
) -> str:
    """Render the script of a job that runs one verb, or of an array with a verb in each element.

    Args:    commands: words behind `xmtf`. nodes: more than one starts ranks on all of them. uses_gpus: False asks for
             no GPU.
    Raises:  ConfigError: a word that no script can carry.
    """
    shape = ArrayShape(len(commands), max_running) if len(commands) > 1 else None
    tasks, cpus = (slurm.ranks, slurm.cpus_per_rank) if nodes > 1 else (1, None)
    if nodes == 1 and slurm.cpus_per_rank is not None:
        cpus = slurm.cpus_per_rank * slurm.ranks
    lines = directives(
        slurm, job_name=job_name, nodes=nodes, tasks_per_node=tasks, cpus=cpus, array=shape, uses_gpus=uses_gpus
    )
    inside = srun_options(slurm, working_directory=working_directory)
    return _render(
        "command.sbatch",
        slurm,
        working_directory,
        directives=Shell("\n".join(lines)),
        commands=[join(command) for command in commands],
        srun=join([*LAUNCH, *_step_size(nodes, tasks, cpus), *inside]),
    )


def directives(
    slurm: SlurmConfig,
    *,
    job_name: str,
    nodes: int,
    tasks_per_node: int,
    cpus: int | None,
    array: ArrayShape | None,
    uses_gpus: bool = True,
) -> list[str]:
    """Return the #SBATCH lines that all jobs have.

    Args:  cpus: cores of a task.
    """
    gpus = f"gpu:{slurm.gpu_type}:{slurm.gpus_per_node}" if slurm.gpu_type else f"gpu:{slurm.gpus_per_node}"
    limit = "" if array is None or array.max_running is None else f"%{array.max_running}"
    options: list[tuple[str, object]] = [
        ("job-name", job_name),
        ("array", None if array is None else f"0-{array.size - 1}{limit}"),
        ("nodes", nodes),
        ("ntasks-per-node", tasks_per_node),
        ("cpus-per-task", cpus),
        ("gres", gpus if slurm.gpus_per_node and uses_gpus else None),
        ("mem", None if slurm.memory_gib_per_node is None else f"{slurm.memory_gib_per_node}G"),
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("reservation", slurm.reservation),
        ("exclude", slurm.exclude),
        ("time", slurm.time),
        ("output", "%x-%j.out" if array is None else "%x-%A_%a.out"),
        ("open-mode", "append"),
    ]
    lines = [f"#SBATCH --{name}={value}" for name, value in options if value is not None]
    if slurm.exclusive:
        lines.append("#SBATCH --exclusive")
    lines.append("#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue")
    return lines + [f"#SBATCH {option}" for option in slurm.extra]


def _step_size(nodes: int, tasks: int, cpus: int | None) -> list[str]:
    # Since Slurm 22.05 a step does not inherit --cpus-per-task from its job.
    cores = [] if cpus is None else [f"--cpus-per-task={cpus}"]
    return [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}", *cores]


def _render(template: str, slurm: SlurmConfig, working_directory: Path, **values: Any) -> str:
    interpreter = slurm.python or (sys.executable if slurm.container is None else "python")
    python = inside_words(slurm, interpreter, working_directory=working_directory)
    xmtf = [*python, "-m", "megatron_xmtf"]
    inside = srun_options(slurm, working_directory=working_directory)
    alone = ["srun", "--nodes=1", "--ntasks=1", *inside] if inside else []
    text = (
        _environment()
        .get_template(template)
        .render(
            version=Shell(megatron_xmtf.__version__),
            working_directory=str(working_directory),
            setup=[Shell(line) for line in slurm.setup],
            environment=[(Shell(name), value) for name, value in sorted(slurm.environment.items())],
            cache=slurm.node_local_directory,
            python=join(python),
            xmtf=join(xmtf),
            once=join([*alone, *xmtf]),
            **values,
        )
    )
    return text if text.endswith("\n") else text + "\n"


def _quoted(value: Any) -> str:
    """Quote what a template prints: Jinja's `finalize`, which nothing passes by."""
    if isinstance(value, Shell):
        return value
    assert isinstance(value, str | int), f"a template prints {value!r}"
    return quote(str(value))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_directory()),
        finalize=_quoted,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
