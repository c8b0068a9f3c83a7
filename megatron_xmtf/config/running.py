"""Keys of `checkpoint`, `evaluation` and `logging`: what a run keeps, measures and shows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_xmtf.config.section import PositiveInt, Section

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "KeepBestConfig",
    "LoggingConfig",
    "ProfileConfig",
    "StopConfig",
    "WandbConfig",
    "WatchdogConfig",
]


class KeepBestConfig(Section):
    """Keep the checkpoint with the best validation loss as well; of those saved at a step that was measured."""

    metric: Annotated[str, Field(min_length=1)]
    """Name in `metrics.jsonl`, such as `loss/xnli` or `loss/xnli/sw`."""
    mode: Literal["min", "max"] = "min"
    """Which values are better. min: losses."""


class CheckpointConfig(Section):
    """When checkpoints are written and which one a run starts from."""

    save_interval: PositiveInt | None = None
    """Steps between checkpoints. None: only at the end."""
    keep_last: Annotated[int, Field(ge=2, strict=True)] = 2
    """Newest checkpoints kept, at least 2 (the newest may be the one that is damaged)."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept as well."""
    keep_best: KeepBestConfig | None = None
    """The checkpoint that is best by a validation loss is kept as well. None: none is."""
    save_optimizer: bool = True
    """Write optimizer and RNG state. False halves or more the size, and such a checkpoint cannot be resumed."""
    async_save: bool = True
    """Write beside the training, which stops for the copy alone. False: training waits until all is on the disk."""
    write_timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """Minutes after which a writer counts as hanging: it is ended, and the run ends with an error on every rank, at the
    next step. 30: ours; a rank's 10 GB take half a minute on a shared file system of 0.4 GB/s a rank."""
    export_huggingface: Literal["none", "last", "every"] = "none"
    """Write Hugging Face models to `OUT/hf/step_N`, from the last checkpoint or from every one, in a process beside
    the training. Training never waits for it: if an export takes longer than the next checkpoint, that one is skipped,
    with a warning. The end of the run waits for the last one."""
    verify_hashes: bool = True
    """Compare every file of a checkpoint with its SHA-256 before anything in it is read; the ranks share the work,
    about 1 GB/s each. False: sizes alone."""
    resume: Literal["latest", "latest_valid", "none"] | Annotated[int, Field(ge=0, strict=True)] = "latest"
    """latest: go on from the newest checkpoint of `output` if there is one; a damaged one is an error. latest_valid:
    the newest whose every hash is right, damaged ones are told and set aside. A step: exactly that one, or an error.
    none: start from `model`, and refuse an `output` that already holds checkpoints."""


class EvaluationConfig(Section):
    """Validation loss while training, and the tasks that `xmtf evaluate CONFIG` runs."""

    interval: PositiveInt | None = None
    """Steps between measurements of the validation loss. None: never."""
    rows: PositiveInt = 64
    """Rows of each validation dataset, rounded up to whole micro-batches of all data-parallel ranks."""
    tasks: list[str] = []
    """Task files for `xmtf evaluate CONFIG`."""


class WandbConfig(Section):
    """The run in Weights & Biases; a resumed run goes on under its own run id, kept in `OUT/wandb.json`."""

    project: Annotated[str, Field(min_length=1)]
    """Project that the run belongs to."""
    name: str | None = None
    """Name of the run. Default: the last part of `output`."""
    mode: Literal["online", "offline"] = "online"
    """online: sent while training. offline: written to `OUT/wandb`, for `wandb sync` later."""
    group: str | None = None
    """Group that the run is shown in."""
    tags: list[str] = []
    """Tags of the run."""


class ProfileConfig(Section):
    """Steps that `torch.profiler` traces, into `OUT/profile/*.json` (Chrome's trace format)."""

    start: PositiveInt
    """First step traced, counted from 1. Past the first few, which allocate memory and choose kernels."""
    steps: PositiveInt = 3
    """Steps traced; a trace grows by tens of MiB a step."""
    ranks: Literal["first", "all"] = "first"
    """Whose traces are written."""


class LoggingConfig(Section):
    """What is printed, recorded and checked while training."""

    log_interval: PositiveInt = 1
    """Steps between printed lines, and of each mean of `train_loss/...`; `metrics.jsonl` has every step."""
    tensorboard: bool = False
    """Write event files to `OUT/tensorboard`; needs the package `tensorboard`."""
    wandb: WandbConfig | None = None
    """Record the run in Weights & Biases; needs the package `wandb`."""
    profile: ProfileConfig | None = None
    """Trace a window of steps."""
    replica_check_interval: PositiveInt | None = 1000
    """Steps between comparisons, bit by bit, of parameters that several ranks hold; drift ends the run. None: never.
    A comparison reads the weights once and exchanges 16 bytes a parameter tensor."""
    straggler_check_interval: PositiveInt | None = 100
    """Steps between comparisons of how long each rank's own work takes; a slow rank is told, by name. None: never."""
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.25
    """Of a rank's own work to the median rank's, above which it is told. 1.25: ours."""


class StopConfig(Section):
    """When a run stops by itself, and how long it may take; signals and the file `OUT/stop` stop it as well."""

    time_limit_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after its start at which a run saves and ends with exit code 3. None: no limit of its own."""
    slurm_margin_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes before the end of a Slurm job (SLURM_JOB_END_TIME) at which the same happens. 10: Slurm's
    `--signal=USR1@600`, as in ml-engineering's guide; a step and a save must fit."""
    grace_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes that local ranks have, from a signal, to finish their step and save before the launcher kills them.
    10: ours, as long as the margin above."""


class WatchdogConfig(Section):
    """How long a rank may go without progress before it ends the job with exit code 6, naming who is stuck.

    The job ends at most 70 seconds after a limit: two looks of a watchdog (15 s each at most) to notice, as long again
    for the reports of all ranks, seconds for the launcher. torchrun takes 30 more to kill a stopped process.
    """

    enabled: bool = True
    """Whether anybody watches."""
    progress_minutes: Annotated[float, Field(gt=0)] = 9.0
    """Minutes without a micro-batch begun, an update done or a batch read, however long the step as a whole takes. 9:
    less than `parallel.distributed_timeout_minutes`, whose error names neither the rank nor what it did."""
    start_minutes: Annotated[float, Field(gt=0)] = 60.0
    """The same for loading the model, and for the first step, which compiles kernels. 60: ours."""
    validation_minutes: Annotated[float, Field(gt=0)] = 60.0
    """The same for one measurement of the validation losses. 60: ours."""
    save_minutes: Annotated[float, Field(gt=0)] = 90.0
    """The same for what training waits for at a save. 90: ours; the save before may take `write_timeout_minutes`, and
    without `async_save` this one as well."""
