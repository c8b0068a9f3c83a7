"""What can be known before a queue is waited for: sizes, inputs, time, memory, disk, shared paths, Slurm's own word.

Each check returns findings and raises nothing that a user can mend: all of them are told at once.

    ok        looked at, and right            warning   the job may be lost; it is submitted all the same
    note      not looked at, and why          error     the job would fail: it is not submitted
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_xmtf.cluster import slurm as commands
from megatron_xmtf.cluster.attempts import newest_step
from megatron_xmtf.cluster.container import is_file, unseen
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.config.slurm import SlurmConfig, seconds_of_time
from megatron_xmtf.errors import DatasetError, XmtfError
from megatron_xmtf.models.architecture import Architecture

__all__ = [
    "UNNAMED",
    "Finding",
    "check_container",
    "check_disk",
    "check_inputs",
    "check_paths",
    "check_script",
    "check_sizes",
    "check_time",
]

SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "panfs", "orangefs", "wekafs", "afs"} | {
    f"fuse.{name}" for name in ("glusterfs", "juicefs", "ceph", "ceph-fuse", "daos", "quobyte", "sshfs", "moosefs")
}
"""Types of file systems that several machines see."""
UNNAMED = "(published)"
"""What a recipe's missing model and output are called in a dry run (`planning/run_model.py`)."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "warning", "error"]
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.topic:<10} {self.text}"


def check_sizes(config: RunConfig) -> list[Finding]:
    """Check that nodes x ranks hold the layout, and that the global batch deals evenly."""
    from megatron_xmtf.data.loader import require_even_deal
    from megatron_xmtf.parallel.topology import check_world_size

    slurm, parallel = config.slurm, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    what = f"{slurm.nodes} nodes x {slurm.ranks} ranks = {slurm.world_size}"
    try:
        dp = check_world_size(parallel, slurm.world_size)
        require_even_deal(config.batch.step_rows, config.batch.micro_batch_size, dp)
    except XmtfError as error:
        return [Finding("error", "sizes", f"{what}: {error}")]
    found = [Finding("ok", "sizes", f"{what} = TP{tp} x PP{pp} x DP{dp}")]
    if slurm.gpus_per_node and slurm.ranks < slurm.gpus_per_node:
        unused = slurm.gpus_per_node - slurm.ranks
        found.append(Finding("warning", "sizes", f"{unused} of {slurm.gpus_per_node} GPUs a node stay idle"))
    if slurm.ranks % tp:
        found.append(
            Finding("warning", "sizes", f"tensor-parallel groups of {tp} cross nodes of {slurm.ranks} ranks: slow")
        )
    return found


def check_inputs(config: RunConfig, *, is_waiting: bool) -> list[Finding]:
    """Check model, data, tokenizer, packing index and the checkpoint to resume, as the job itself will.

    Args:  is_waiting: the job waits for others, which may still make its inputs: nothing is looked at.
    """
    if is_waiting:
        return [Finding("note", "inputs", "not looked at: the jobs that this one waits for may make them")]
    from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME
    from megatron_xmtf.training.prepare import prepare_run

    if (Path(config.output) / "stop").exists():
        remedy = "remove it, or take another output"
        return [Finding("error", "inputs", f"{Path(config.output) / 'stop'} asks the run not to go on; {remedy}")]
    built = config.model_copy(update={"data": config.data.model_copy(update={"build_index": False})})
    try:
        with _quiet():
            prepared = prepare_run(built, world_size=config.slurm.world_size, import_model=False, leaves_files=False)
    except DatasetError as error:
        remedy = "xmtf pack CONFIG builds it, also as a job: xmtf submit CONFIG -- pack CONFIG"
        return [Finding("error", "inputs", f"{error}{f' ({remedy})' if 'index' in str(error) else ''}")]
    except XmtfError as error:
        return [Finding("error", "inputs", str(error))]
    resumed = f"resumes at step {prepared.start.step}" if prepared.start.resumed else f"starts from {config.model}"
    found = [Finding("ok", "inputs", f"model, tokenizer, data and packing index are there; {resumed}")]
    if not (prepared.start.checkpoint / MANIFEST_NAME).is_file() and config.slurm.world_size > 1:
        remedy = "xmtf import writes a checkpoint once, to be named as model"
        text = f"{config.model} is imported when the job starts, by one rank while all others wait; {remedy}"
        found.append(Finding("warning", "inputs", text))
    return found


def check_time(config: RunConfig, architecture: Architecture | None, *, links: int) -> list[Finding]:
    """Compare the plan's time and memory with the job's limit.

    Args:  architecture: None: no model is there to plan for. links: jobs in the chain.
    """
    return check_limit(config) + _check_estimate(config, architecture, links=links)


def check_limit(config: RunConfig) -> list[Finding]:
    """Check that the time before the limit at which the run is told to stop leaves time to train."""
    slurm, margin = config.slurm, config.stop.slurm_margin_minutes
    limit = None if slurm.time is None else seconds_of_time(slurm.time)
    if limit is None:
        return []
    if limit <= 60 * margin:
        text = f"time={slurm.time} is not above stop.slurm_margin_minutes={margin:g}"
        return [Finding("error", "limit", f"{text}: newer Slurms tell a job its end, and it would stop at once")]
    if limit < 2 * slurm.signal_seconds:
        text = (
            f"half of time={slurm.time} and more is signal_seconds={slurm.signal_seconds}, in which nothing is trained"
        )
        return [Finding("warning", "limit", text)]
    return []


def _check_estimate(config: RunConfig, architecture: Architecture | None, *, links: int) -> list[Finding]:
    slurm = config.slurm
    if slurm.hardware is None:
        return [Finding("note", "time", "not estimated: slurm.hardware names no cluster, as in slurm.hardware=h100")]
    if architecture is None:
        return [Finding("note", "time", "not estimated: the model is not there yet")]
    from megatron_xmtf.planning.cluster import load_cluster
    from megatron_xmtf.planning.hardware_plan import plan_hardware

    try:
        plan = plan_hardware(config, architecture, load_cluster(slurm.hardware), gpus=slurm.world_size)
    except XmtfError as error:
        return [Finding("error", "time", str(error))]
    found = [
        Finding("error" if warning["is_refused"] else "warning", "plan", warning["message"])
        for warning in plan.warnings
    ]
    done = min(newest_step(Path(config.output)) / config.train_steps, 1.0)
    hours = plan.cost.hours * (1 - done)
    what = f"{hours:.1f} hours planned on {slurm.hardware} ({plan.time.seconds:.1f} s a step)"
    limit = None if slurm.time is None else seconds_of_time(slurm.time)
    if limit is None:
        return [*found, Finding("note", "time", f"{what}; slurm.time is not set, the partition's limit holds")]
    usable = (limit - slurm.signal_seconds) / 3600
    jobs = max(1, -(-int(hours * 3600) // max(1, limit - slurm.signal_seconds)))
    if jobs == 1:
        found.append(Finding("ok", "time", f"{what}; one job of {slurm.time} is enough"))
    elif slurm.requeue or links >= jobs:
        how = f"--chain {links}" if links >= jobs else "requeue"
        found.append(Finding("ok", "time", f"{what}, {usable:.1f} in a job of {slurm.time}: {jobs} starts, by {how}"))
    else:
        remedy = f"slurm.requeue=true or --chain {jobs}"
        found.append(Finding("warning", "time", f"{what}, {usable:.1f} in a job: it will not end; {remedy}"))
    return found


def check_disk(config: RunConfig, architecture: Architecture | None) -> list[Finding]:
    """Compare what the run's checkpoints will take with the space that is free."""
    if architecture is None:
        return [Finding("note", "disk", "not estimated: the model is not there yet")]
    size = checkpoint_bytes(config, architecture)
    output, checkpoint = Path(config.output), config.checkpoint
    saves = 1 if checkpoint.save_interval is None else -(-config.train_steps // checkpoint.save_interval)
    every = config.train_steps // checkpoint.keep_every if checkpoint.keep_every else 0
    # One more than is kept is there while the next one is written.
    kept = min(saves, checkpoint.keep_last + every + (checkpoint.keep_best is not None)) + 1
    models = {"none": 0, "last": 1, "every": saves}[checkpoint.export_huggingface]
    there = sum(path.stat().st_size for path in (output / "checkpoints").rglob("*") if path.is_file())
    needed = kept * size + models * architecture.parameter_count * BYTES[config.precision] - there
    if config.output == UNNAMED:
        return [Finding("note", "disk", f"{kept} checkpoints of {size / 1e9:,.1f} GB at most; add output=DIR")]
    free = shutil.disk_usage(_existing(output)).free
    text = f"{kept} checkpoints of {size / 1e9:,.1f} GB at most; {free / 1e9:,.1f} GB are free at {output}"
    if needed <= free:
        return [Finding("ok", "disk", text)]
    remedy = "free space, keep fewer (checkpoint.keep_last, keep_every), or take another output"
    level: Literal["warning", "error"] = "error" if 2 * size > free else "warning"
    return [Finding(level, "disk", f"{text}: not enough for all of them; {remedy}")]


def checkpoint_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Return the size of one checkpoint: weights, and with AdamW fp32 weights and two moments (14 bytes in bf16)."""
    each = BYTES[config.precision]
    if config.checkpoint.save_optimizer:
        each += 4 if config.precision != "fp32" else 0
        each += 8 if config.optimizer.name == "adamw" else 0
    return each * architecture.parameter_count


def check_paths(paths: Sequence[Path], *, nodes: int) -> list[Finding]:
    """Check that the nodes will see paths: that they lie on file systems of a kind that is shared.

    Args:  paths: need not exist. nodes: of the job.
    """
    found = []
    for place, kind in sorted({_mount(_existing(path.absolute())) for path in paths}):
        if kind not in SHARED:
            there = [str(path) for path in paths if _mount(_existing(path.absolute()))[0] == place]
            more = f" and {len(there) - 4} more" if len(there) > 4 else ""
            which = f"{', '.join(there[:4])}{more}"
            text = f"{which}: on {place} ({kind}), which the nodes see only if it is exported to them"
            found.append(Finding("warning", "paths", text))
    return found or [Finding("ok", "paths", f"on file systems that are shared ({nodes} nodes)")]


def check_container(slurm: SlurmConfig, paths: Sequence[Path], *, working_directory: Path) -> list[Finding]:
    """Check that the image is there, and that what the run reads and writes is seen inside.

    Args:  paths: of inputs and outputs, absolute.
    """
    container = slurm.container
    if container is None:
        return []
    if is_file(container) and not Path(container.image).exists():
        return [Finding("error", "container", f"slurm.container.image={container.image} does not exist")]
    found = []
    if not is_file(container):
        make = "enroot import" if container.runtime == "pyxis" else "apptainer pull"
        found.append(Finding("warning", "container", f"{container.image} is pulled at every start; {make} it once"))
    for mount in container.mounts:
        if not Path(mount.split(":")[0]).exists():
            found.append(Finding("warning", "container", f"the mount {mount} is not there on this machine"))
    hidden = unseen(slurm, [working_directory, *paths], working_directory=working_directory)
    if hidden:
        which = ", ".join(map(str, hidden))
        remedy = "unless the site mounts it by itself, add a directory above it to slurm.container.mounts"
        found.append(Finding("warning", "container", f"not seen inside: {which}; {remedy}"))
    return found or [Finding("ok", "container", f"{container.image}; what the run reads and writes is seen inside")]


def check_script(text: str, slurm: SlurmConfig, *, nodes: int, is_dry: bool) -> list[Finding]:
    """Ask Slurm: whether the partition has such nodes and such a time, and whether it would take the script.

    Args:  is_dry: nothing will be submitted: a Slurm that does not answer is no fault.
    """
    if not commands.has_slurm():
        return [Finding("note", "slurm", "not asked: sbatch is not on this machine")]
    try:
        limits = commands.partition_limits(slurm.partition)
        takes, words = commands.test_script(text, directory=Path.home())
    except XmtfError as error:
        return [Finding("note" if is_dry else "error", "slurm", str(error))]
    if limits is None:
        return [Finding("error", "slurm", f"there is no partition {slurm.partition or '(default)'}: sinfo lists them")]
    available, longest = limits
    limit, most = seconds_of_time(slurm.time or ""), seconds_of_time(longest)
    if nodes > available:
        return [Finding("error", "slurm", f"{nodes} nodes asked for, the partition has {available}")]
    if limit is not None and most is not None and limit > most:
        return [Finding("error", "slurm", f"slurm.time={slurm.time} is more than the partition's {longest}")]
    found = [Finding("ok" if takes else "error", "slurm", words)]
    names = commands.overriding_variables()
    if names:
        text = f"{', '.join(names)} of this shell goes before what the script says; unset it, or mean it"
        found.append(Finding("warning", "slurm", text))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what preparing a run logs out of a report."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _mount(path: Path) -> tuple[str, str]:
    """Return where the file system of a path is mounted, and its type."""
    table = Path("/proc/self/mounts")
    best, kind = "/", "unknown"
    for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else []:
        _, place, found, *_ = line.split()
        place = place.replace("\\040", " ")
        if path.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, found
    return best, kind
