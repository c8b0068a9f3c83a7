"""What a training run is: its sections, and what must hold between them; the keys are in the files beside this one.

Keys have Megatron-Core's names where it has one. The models are frozen, and an unknown key is an error.
"BLOOMZ" as a source means the published tr13 scripts of bigscience-workshop/bigscience.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_xmtf.config.data import DataConfig, DatasetConfig, GuardsConfig
from megatron_xmtf.config.optimization import DropoutConfig, LossConfig, OptimizerConfig, ScheduleConfig
from megatron_xmtf.config.parallel import BatchConfig, KernelsConfig, ParallelConfig, RampupConfig, RecomputeConfig
from megatron_xmtf.config.running import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ProfileConfig,
    StopConfig,
    WandbConfig,
    WatchdogConfig,
)
from megatron_xmtf.config.section import Section
from megatron_xmtf.config.slurm import ContainerConfig, SlurmConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "ContainerConfig",
    "DataConfig",
    "DatasetConfig",
    "DropoutConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LossConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RampupConfig",
    "RecomputeConfig",
    "RunConfig",
    "ScheduleConfig",
    "SlurmConfig",
    "StopConfig",
    "WandbConfig",
    "WatchdogConfig",
]


class RunConfig(Section):
    """One training run."""

    model: str
    """Hugging Face directory or checkpoint whose weights the run starts from. `preset:NAME`: an architecture of
    `models/presets.py` with random weights, which follow from `seed`."""
    tokenizer: str | None = None
    """Directory of the tokenizer that a `preset:NAME` is made for: padding, EOS and the decoder's start are its ids.
    None: the model's own, and only that."""
    output: str
    """Directory of the run: `metrics.jsonl`, `config.yaml`, `checkpoints/`, `status.json`."""
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    dropout: DropoutConfig = DropoutConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights in forward and backward; gradients accumulate in fp32. bf16: BLOOMZ-176B."""
    recompute: RecomputeConfig = RecomputeConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    stop: StopConfig = StopConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    slurm: SlurmConfig = SlurmConfig()
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    """Seed of row order and dropout. 42: BLOOMZ."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        parallel, batch, schedule = self.parallel, self.batch, self.schedule
        if (self.preset is None) != (self.tokenizer is None):
            raise ValueError(
                f"model={self.model} and tokenizer={self.tokenizer}: a preset needs tokenizer (a directory that holds "
                "tokenizer.json), and any other model has its own"
            )
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        if parallel.sequence_parallel and tp == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1; it is 1")
        lengths = ("encoder_length", "decoder_length") if batch.encoder_length else ("sequence_length",)
        for key in lengths:
            if parallel.sequence_parallel and getattr(batch, key) % tp:
                raise ValueError(
                    f"batch.{key}={getattr(batch, key)} is not a multiple of "
                    f"parallel.tensor_model_parallel_size={tp}, which sequence_parallel needs"
                )
        if parallel.virtual_pipeline_model_parallel_size is not None and pp == 1:
            raise ValueError("parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        if parallel.overlap_param_gather and not (parallel.overlap_grad_reduce and parallel.use_distributed_optimizer):
            raise ValueError(
                "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true and "
                "parallel.use_distributed_optimizer=true"
            )
        if self.evaluation.interval is not None and not self.data.validation_datasets:
            raise ValueError("evaluation.interval is set, but data.validation names no dataset to measure")
        if self.checkpoint.keep_best is not None and self.evaluation.interval is None:
            raise ValueError(
                f"checkpoint.keep_best needs evaluation.interval: {self.checkpoint.keep_best.metric} is never measured"
            )
        if schedule.train_rows is not None and self.train_rows != schedule.train_rows:
            below, above = self.train_rows, batch.step_rows.before(self.train_steps + 1)
            if batch.rampup_batch_size is None:
                rule = f"is not a multiple of batch.global_batch_size={batch.global_batch_size}"
            else:
                rule = "does not end with a step of the ramp"
            raise ValueError(
                f"schedule.train_rows={schedule.train_rows} {rule}; use {f'{below} or ' if below else ''}{above}"
            )
        if self.kernels.attention == "sdpa" and self.precision != "fp32":
            raise ValueError(
                f"kernels.attention=sdpa needs precision=fp32, it is {self.precision}: torch would round the ALiBi "
                "bias to it; use auto or reference"
            )
        if batch.prefix_lm and self.checkpoint.export_huggingface != "none":
            raise ValueError(
                f"checkpoint.export_huggingface={self.checkpoint.export_huggingface} and batch.prefix_lm=true: "
                "transformers would read inputs causally, another model than the trained one; leave export_huggingface "
                "out (`xmtf export --allow-causal` writes the weights all the same)"
            )
        profile = self.logging.profile
        if profile is not None and profile.start + profile.steps - 1 > self.train_steps:
            raise ValueError(
                f"logging.profile asks for steps {profile.start} to {profile.start + profile.steps - 1}, the run has "
                f"{self.train_steps}"
            )
        if self.kernels.adam in ("reference", "transformer_engine", "apex") and (
            self.optimizer.name != "adamw" or self.optimizer.offload == "cpu"
        ):
            raise ValueError(
                f"kernels.adam={self.kernels.adam} updates by AdamW where the parameters are; optimizer.name is "
                f"{self.optimizer.name}, optimizer.offload {self.optimizer.offload}: leave kernels.adam out"
            )
        if self.optimizer.name == "adafactor" and parallel.use_distributed_optimizer:
            raise ValueError(
                "optimizer.name=adafactor and parallel.use_distributed_optimizer=true cannot be combined: flat shards "
                "have no rows and columns to factor; its state is small, set use_distributed_optimizer=false"
            )
        for key in ("lr_warmup_steps", "lr_wsd_decay_steps"):
            steps = getattr(schedule, key)
            if steps is not None and steps > self.train_steps:
                raise ValueError(f"schedule.{key}={steps} is more than the run's {self.train_steps} steps")
        if self.warmup_rows + self.wsd_decay_rows > self.train_rows:
            raise ValueError(
                f"schedule: warm-up and decay of the learning rate take {self.warmup_rows} and {self.wsd_decay_rows:g} "
                f"rows, the run has {self.train_rows}"
            )
        return self

    @property
    def preset(self) -> str | None:
        """Name of the preset that `model` asks for; None: a model with weights."""
        return self.model.removeprefix("preset:") if self.model.startswith("preset:") else None

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer lies: with the model, or by itself."""
        return self.model if self.tokenizer is None else self.tokenizer

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.schedule.train_steps is not None:
            return self.schedule.train_steps
        assert self.schedule.train_rows is not None, "the schema requires train_steps or train_rows"
        return self.batch.step_rows.step_of(self.schedule.train_rows)

    @property
    def train_rows(self) -> int:
        """Rows of the whole run."""
        return self.batch.step_rows.before(self.train_steps)

    @property
    def warmup_rows(self) -> int:
        """Rows of the learning rate's warm-up."""
        return self.schedule.lr_warmup_rows or self.batch.step_rows.before(self.schedule.lr_warmup_steps)

    @property
    def wsd_decay_rows(self) -> float:
        """Rows of the decay that ends a wsd schedule; 0 with any other."""
        schedule = self.schedule
        if schedule.lr_wsd_decay_fraction is not None:
            return schedule.lr_wsd_decay_fraction * self.train_rows
        if schedule.lr_wsd_decay_steps is not None:
            return self.train_rows - self.batch.step_rows.before(self.train_steps - schedule.lr_wsd_decay_steps)
        return schedule.lr_wsd_decay_rows or 0
