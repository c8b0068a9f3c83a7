"""Keys of `slurm`: how a run is put on a cluster by `xmtf submit`.

Names go into `#SBATCH` lines, which no shell reads: they are held to letters that need no quoting. Paths and values go
into the script, quoted. `setup` and `extra` are the user's own lines and stand as they are.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from megatron_xmtf.config.section import PositiveInt, Section

__all__ = ["ContainerConfig", "SlurmConfig", "seconds_of_time"]


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x1f\x7f\u0085\u2028\u2029]", text):
        raise ValueError("holds a newline or another control character, which a job script cannot carry")
    return text


def _is_time(text: str) -> str:
    if seconds_of_time(text) is None:
        raise ValueError("is no time of Slurm's: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, above 0")
    return text


def _minutes(value: object) -> object:
    """YAML reads `time: 90` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@+-]*$", max_length=200)]
Constraint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9(\[][A-Za-z0-9_.,:@+()\[\]&|*-]*$", max_length=200)]
JobName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=80)]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, StringConstraints(pattern=r"^[^-]"), AfterValidator(_one_line)]
"""Where a leading dash would make an option of it."""
NodePath = Annotated[str, StringConstraints(pattern=r"^/"), AfterValidator(_one_line)]
Time = Annotated[str, BeforeValidator(_minutes), AfterValidator(_is_time)]
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z]"), AfterValidator(_one_line)]


def seconds_of_time(text: str) -> int | None:
    """Return the seconds of a time in Slurm's words; None: it is none, or zero.

    90 -> 5400   2:30 -> 150   20:00:00 -> 72000   4-4 -> 360000   4-04:00 -> 360000   4-04:00:00 -> 360000
    """
    found = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})", text)
    if found is None:
        return None
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        total = int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    elif len(parts) == 3:
        total = parts[0] * 3600 + parts[1] * 60 + parts[2]
    else:
        total = parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
    return total or None


class ContainerConfig(Section):
    """The image that everything runs in."""

    image: Word
    """File of the image (for pyxis with a / or ./ at its beginning), or a name in a registry, which every start pulls:
    `docker://...`, for pyxis `nvcr.io#nvidia/pytorch:25.04-py3`."""
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """apptainer: `apptainer exec --nv IMAGE ...`. pyxis: NVIDIA's plugin, `srun --container-image=IMAGE`."""
    mounts: list[NodePath] = []
    """Directories to be seen inside, `PATH`, `PATH:INSIDE` or `PATH:INSIDE:OPTIONS`. Those of model, data and output
    must be among them, under their own names; apptainer adds the home, the working directory and /tmp by itself."""

    @model_validator(mode="after")
    def _mountable(self) -> ContainerConfig:
        for mount in self.mounts:
            require_mountable(mount, self, separators=",")
        return self


def require_mountable(mount: str, container: ContainerConfig, *, separators: str) -> None:
    """Refuse a mount that the container's tool cannot be told of.

    Args:    separators: letters that end a mount, or a part of one.
    Raises:  ValueError: one of those; for pyxis what a shell reads, as it writes mounts into a script unquoted.
    """
    letters = separators + ('"$`\\' if container.runtime == "pyxis" else "")
    read = [letter for letter in letters if letter in mount]
    if read:
        raise ValueError(
            f"{container.runtime} cannot be told of the mount {mount!r}: it reads {' '.join(read)} itself; "
            "mount a directory above it, or rename it"
        )


class SlurmConfig(Section):
    """The job of a run. What is None is left to the cluster's defaults."""

    nodes: PositiveInt = 1
    """Nodes of a training job; other jobs take one."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on each node. None: `gpus_per_node`, or 1 without GPUs."""
    gpus_per_node: Annotated[int, Field(ge=0, strict=True)] = 0
    """GPUs asked for on each node (`--gres=gpu:N`); every rank takes one."""
    gpu_type: Name | None = None
    """Type of GPU, as in `--gres=gpu:TYPE:N`."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores of each rank."""
    memory_gib_per_node: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Memory asked for on each node, in GiB. 0: all of it."""
    exclusive: bool = False
    """Share the nodes with nobody."""
    account: Name | None = None
    """Who pays."""
    partition: Name | None = None
    """Which nodes are asked for."""
    qos: Name | None = None
    """Quality of service."""
    constraint: Constraint | None = None
    """Features that the nodes must have."""
    reservation: Name | None = None
    """Nodes set aside before."""
    exclude: Constraint | None = None
    """Nodes never to be used, in Slurm's list form: `gpu[07-08]`."""
    time: Time | None = None
    """Limit of one job: MINUTES, HH:MM:SS or D-HH:MM:SS. A longer run goes on by requeue or in a chain of jobs."""
    hardware: str | None = None
    """Cluster as in `xmtf plan --cluster` (a preset such as h100, or a YAML file), by which `xmtf submit` estimates
    time and memory. None: it does not."""
    job_name: JobName | None = None
    """Name of the job. None: after the run directory."""
    signal_seconds: Annotated[int, Field(ge=30, strict=True)] = 600
    """Seconds before the time limit at which the run is told to save and end. Slurm may say it up to a minute earlier;
    a step and a save must fit. 600: ml-engineering's guide."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun: every rank is a task of Slurm's, so signals and exit codes pass through nobody. torchrun: one a node."""
    python: Word | None = None
    """Interpreter in the job. None: the one that runs `xmtf submit`; in a container `python`."""
    setup: list[Line] = []
    """Lines of shell before anything else runs, as they are: `module load cuda`, `source venv/bin/activate`."""
    container: ContainerConfig | None = None
    """Image that everything runs in. None: the nodes' own system."""
    environment: dict[VariableName, Line] = {}
    """Variables for all ranks: NCCL_*, GLOO_*, UCX_* and others."""
    node_local_directory: NodePath | None = None
    """Directory on each node's own disk; compiled kernels are cached in a fresh directory there, not in the home
    directory, which thousands of ranks would hammer. None: wherever Triton, torch and CUDA put them."""
    requeue: bool = True
    """Put the job back into the queue when it was told to stop, hung, or failed, as `requeue_on` says."""
    requeue_on: list[Literal["requeue", "hang", "failed"]] = ["requeue", "hang", "failed"]
    """Outcomes after which the job goes back: exit codes 3, 6 and 1 (a GPU that dies is 1). The user's mistakes,
    damaged checkpoints, NaN and a full disk would only come again."""
    max_attempts_without_progress: PositiveInt = 3
    """Starts in a row from one and the same checkpoint, after which nothing is started any more. 3:
    nvidia-resiliency-ext's launcher gives up after as many cycles."""
    max_attempts: PositiveInt | None = None
    """Starts in all of one submission. None: as many as make progress."""
    extra: list[Option] = []
    """Further options of sbatch, as they are: `--mail-type=END`, `--switches=2`."""

    @model_validator(mode="after")
    def _consistent(self) -> SlurmConfig:
        limit = None if self.time is None else seconds_of_time(self.time)
        if limit is not None and limit <= self.signal_seconds:
            raise ValueError(
                f"signal_seconds={self.signal_seconds} is not below time={self.time} ({limit} s): the run would be "
                "told to stop before it starts"
            )
        if self.launcher == "torchrun" and self.container is not None:
            raise ValueError("launcher=torchrun cannot reach ranks inside a container with a signal; use launcher=srun")
        if self.container is not None and self.node_local_directory is not None:
            # The caches there are wanted inside.
            require_mountable(self.node_local_directory, self.container, separators=",:")
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError(f"gpu_type={self.gpu_type} needs gpus_per_node; it is 0")
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node={self.ranks} are more than gpus_per_node={self.gpus_per_node}; a rank takes a GPU"
            )
        return self

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of a training job."""
        return self.nodes * self.ranks
