"""What a training run is: every key, its unit, its default and where the default comes from.

Keys have Megatron-Core's names where it has one. The models are frozen, and an unknown key is an error.
"BLOOMZ" as a source means the published tr13 scripts of bigscience-workshop/bigscience.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_xmtf.config.mixture import ColumnName, MixtureConfig, MixtureEntry, SelectionConfig, check_weights
from megatron_xmtf.config.section import Fraction, PositiveInt, Section

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LossConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RecomputeConfig",
    "RunConfig",
    "ScheduleConfig",
    "WandbConfig",
]


class DatasetConfig(SelectionConfig):
    """One indexed dataset, or a part of it."""

    prefix: str
    """Path prefix of the indexed files: `<prefix>_inputs_document.idx` or `<prefix>_text_document.idx`."""
    name: str | None = None
    """Name in reports. Default: the last part of `prefix`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Relative number of examples drawn from this dataset. None for all: each example once an epoch."""


class GuardsConfig(Section):
    """Which examples of the mixture repeat one another, or repeat what the run is evaluated on.

    `xmtf plan` reports; `xmtf pack` and `xmtf train` look only where something is to be dropped.
    """

    duplicates: Literal["off", "report", "drop"] = "report"
    """Examples whose inputs and targets equal an earlier example's after normalisation (case, punctuation, spaces).
    report: counted; drop: counted and not trained on; off: not looked for."""
    near_duplicates: Literal["off", "report", "drop"] = "off"
    """Examples that are nearly an earlier one of the same dataset and template. As `duplicates`."""
    contamination: Literal["off", "report", "drop"] = "report"
    """Examples that hold a text of `evaluation.tasks`. As `duplicates`."""
    ngram_words: Annotated[int, Field(ge=2, strict=True)] = 13
    """Words of the n-grams whose overlap is contamination. 13: GPT-3, AlexaTM."""
    ngram_characters: Annotated[int, Field(ge=2, strict=True)] = 30
    """The same in letters of scripts without spaces (kana, Thai, Lao, Khmer, Myanmar, Tibetan; Han counts 1.5 each)."""
    short_ngram_words: Annotated[int, Field(ge=2, strict=True)] = 8
    """A shorter evaluation text is looked for as a whole if it has this many words. 8: GPT-3."""
    short_ngram_characters: Annotated[int, Field(ge=2, strict=True)] = 18
    """The same in letters."""
    minimum_overlap: Fraction = 0.0
    """Share of an evaluation text's n-grams that an example must hold. 0: one of them is enough."""
    jaccard: Annotated[float, Field(ge=0.1, le=1)] = 0.8
    """Least similarity of near duplicates, of their inputs and of their targets."""
    boilerplate: Annotated[float, Field(ge=0.01, le=1)] = 0.2
    """Wording in at least this share of a template's examples is the template's and does not count."""
    workers: PositiveInt = 1
    """Processes that scan; the result is the same for any number."""
    directory: str | None = None
    """Where results are kept. Default: `OUT/guards`."""

    @model_validator(mode="after")
    def _sizes(self) -> GuardsConfig:
        for short, full in (("short_ngram_words", "ngram_words"), ("short_ngram_characters", "ngram_characters")):
            if getattr(self, short) > getattr(self, full):
                raise ValueError(f"{short}={getattr(self, short)} is more than {full}={getattr(self, full)}")
        return self


class DataConfig(Section):
    """Which examples are read, and how they are packed into rows."""

    train: list[DatasetConfig] = []
    """Datasets of a plain training mixture. Weights are given for all of them or for none. This or `mixture`."""
    mixture: MixtureConfig | None = None
    """A full mixture: its keys, or a YAML file of them, or the name of one that is shipped (xp3, flan2022 ...), or a
    weight file of the reference ("train: 0.39 0:0.95 /path/xp3_en, ...")."""
    mixture_root: str | None = None
    """Directory that the mixture's prefixes are relative to, whatever it says; a weight file's paths keep their last
    part only."""
    validation: list[DatasetConfig] = []
    """Datasets whose loss is measured every `evaluation.interval` steps; never trained on. A weight file is read as
    well. Default: what the mixture's `validation` holds out, dataset by dataset."""
    split_seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Decides which documents an interval (`split: "0:0.95"`) and a `max_examples` choose. Apart from `seed`, so that
    runs that differ in their seed hold out the same documents."""
    long_examples: Literal["drop", "truncate_inputs_left", "truncate_inputs_right", "error"] = "drop"
    """What happens to an example longer than a row; always counted. drop: BLOOMZ."""
    guards: GuardsConfig = GuardsConfig()
    """Duplicates and contamination: what is looked for, and what is left out."""
    index_directory: str | None = None
    """Where packing indexes are kept. Default: `OUT/packing`."""
    build_index: bool = True
    """Build a missing packing index before training. False: a missing index is an error (run `xmtf pack`)."""

    @model_validator(mode="after")
    def _one_mixture(self) -> DataConfig:
        if (self.mixture is None) == (not self.train):
            raise ValueError("give exactly one of `train` (a list of datasets) and `mixture`")
        check_weights(_entries(self.train), "train")
        return self

    @property
    def training_mixture(self) -> MixtureConfig:
        """The mixture that is trained on; a plain list of datasets is one too."""
        return self.mixture or MixtureConfig(entries=_entries(self.train))

    @property
    def training_datasets(self) -> list[DatasetConfig]:
        """Every dataset of the training mixture once, in the order of its first appearance."""
        mixture = self.training_mixture
        names = mixture.dataset_names()
        return [DatasetConfig(prefix=mixture.path(prefix), name=name) for prefix, name in names.items()]

    @property
    def validation_datasets(self) -> list[DatasetConfig]:
        """The validation datasets: those named, or what the mixture holds out."""
        mixture = self.mixture
        if self.validation or mixture is None or mixture.validation is None:
            return self.validation
        names = mixture.dataset_names()
        held_out: list[DatasetConfig] = []
        for prefix, selections, _ in mixture.selections():
            entry = DatasetConfig(
                prefix=mixture.path(prefix),
                split=mixture.validation,
                where={column: patterns for one in selections for column, patterns in one.where.items()},
                exclude=_union(one.exclude for one in selections),
            )
            if entry not in held_out:
                held_out.append(entry)
        # A dataset that several entries read in parts is measured in those parts, told apart by a number.
        part_of = Counter(entry.prefix for entry in held_out)
        name_of = {mixture.path(prefix): name for prefix, name in names.items()}
        number: Counter[str] = Counter()
        named = []
        for entry in held_out:
            number[entry.prefix] += 1
            part = f"#{number[entry.prefix]}" if part_of[entry.prefix] > 1 else ""
            named.append(entry.model_copy(update={"name": name_of[entry.prefix] + part}))
        return named


def _union(conditions: Iterable[dict[ColumnName, list[str]]]) -> dict[ColumnName, list[str]]:
    """Return conditions of which any may hold: {language: [sw]}, {language: [th]} -> {language: [sw, th]}."""
    joined: dict[ColumnName, list[str]] = {}
    for condition in conditions:
        for column, patterns in condition.items():
            joined[column] = joined.get(column, []) + patterns
    return joined


def _entries(train: list[DatasetConfig]) -> list[MixtureEntry]:
    return [MixtureEntry(**entry.model_dump()) for entry in train]


class ParallelConfig(Section):
    """How the model is split over ranks; the data-parallel size follows from the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline stage (interleaved schedule). None: one chunk, plain 1F1B."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer of the first stage. BLOOM-176B: 70 layers + embedding + head = 72 stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and its loss as one layer of the last stage."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers of the first stage; the others share the rest evenly. Not with the two settings above."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """The same of the last stage."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence; needs tp > 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the two settings above."""
    distributed_timeout_minutes: PositiveInt = 10
    """A collective that waits longer than this ends the run."""

    @model_validator(mode="after")
    def _one_split(self) -> ParallelConfig:
        counted = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        given = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        uneven = [key for key in counted + given if getattr(self, key)]
        if uneven and self.pipeline_model_parallel_size == 1:
            raise ValueError(f"{uneven[0]} needs pipeline_model_parallel_size > 1; it is 1")
        if any(key in counted for key in uneven) and any(key in given for key in uneven):
            raise ValueError(f"{uneven[0]} and {uneven[-1]} cannot be combined: layers are counted or given")
        return self


class BatchConfig(Section):
    """Sizes of batches, in packed rows."""

    micro_batch_size: PositiveInt = 1
    """Rows in one forward pass of one data-parallel rank. 1: BLOOMZ-176B."""
    global_batch_size: PositiveInt = 2048
    """Rows per optimizer step over all data-parallel ranks. 2048: BLOOMZ from 1b7 up."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 2048
    """Tokens of a row that the model reads; a row holds one more, the label of the last. 2048: BLOOMZ."""


class OptimizerConfig(Section):
    """AdamW or Adafactor; norms and biases are not decayed. Defaults with `name: adafactor` are T5X's, as mT0 ran."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw: BLOOMZ. adafactor: mT0; one number a row and one a column of a matrix instead of two a parameter, no first
    moment. Not with `parallel.use_distributed_optimizer`, whose flat shards have no rows and columns."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate. 2e-5: BLOOMZ; with adafactor 1e-3: T5X finetune.gin, mT0."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay of matrices. 1e-4: BLOOMZ; with adafactor 0: T5X."""
    adam_beta1: Fraction = 0.9
    """First-moment decay. 0.9: BLOOMZ."""
    adam_beta2: Fraction = 0.95
    """Second-moment decay. 0.95: BLOOMZ."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Denominator floor. 1e-8: BLOOMZ."""
    adafactor_decay_rate: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Second moments decay by 1 - step ** -rate. 0.8: T5X `decay_rate`, mT0."""
    adafactor_clipping_threshold: Annotated[float, Field(gt=0)] = 1.0
    """Largest root mean square of a parameter's update before the rate. 1.0: T5X `clipping_threshold`."""
    adafactor_multiply_by_parameter_scale: bool = True
    """Make the rate relative to the root mean square of each parameter. True: T5X `multiply_by_parameter_scale`."""
    adafactor_epsilon1: Annotated[float, Field(gt=0)] = 1e-30
    """Added to squared gradients. 1e-30: T5X `epsilon1`."""
    adafactor_epsilon2: Annotated[float, Field(gt=0)] = 1e-3
    """Least root mean square of a parameter that the rate is relative to. 1e-3: T5X `epsilon2`."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off. 1.0: BLOOMZ; with adafactor 0: T5X."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_adafactor(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "adafactor":
            return {"lr": 1e-3, "weight_decay": 0.0, "clip_grad": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _no_keys_of_the_other(self) -> OptimizerConfig:
        other = "adafactor_" if self.name == "adamw" else "adam_"
        for key, field in type(self).model_fields.items():
            if key.startswith(other) and getattr(self, key) != field.default:
                raise ValueError(f"{key}={getattr(self, key)} has no meaning with name: {self.name}")
        return self


class ScheduleConfig(Section):
    """How long to train and how the learning rate moves, in optimizer steps or in rows."""

    train_steps: PositiveInt | None = None
    """Optimizer steps. Give this or `train_rows`."""
    train_rows: PositiveInt | None = None
    """Rows in all, a multiple of `global_batch_size`. Give this or `train_steps`."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse_square_root", "wsd"] = "constant"
    """Shape after warm-up. constant: BLOOMZ, mT0. linear, cosine: down to `min_lr` at the last step.
    inverse_square_root: by the root of (warm-up / now). wsd (warm-up, stable, decay): constant, then a decay of
    `lr_wsd_decay_*` at the end."""
    lr_warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps over which the rate rises linearly from 0. 0: BLOOMZ."""
    lr_warmup_rows: PositiveInt | None = None
    """The same in rows, instead of `lr_warmup_steps`."""
    lr_wsd_decay_steps: PositiveInt | None = None
    """Length of the decay that ends a wsd schedule. Give this, `lr_wsd_decay_rows` or `lr_wsd_decay_fraction`."""
    lr_wsd_decay_rows: PositiveInt | None = None
    """The same in rows."""
    lr_wsd_decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a share of the whole run. 0.1 to 0.2 is usual: Haegele et al. 2024, arXiv:2405.18392."""
    lr_wsd_decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "linear"
    """Shape of that decay, as in Megatron-Core. minus_sqrt: 1 - sqrt(progress); exponential: 2 * 0.5**progress - 1."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Rate at the last step of linear, cosine and wsd; the floor of inverse_square_root."""

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.train_steps is None) == (self.train_rows is None):
            raise ValueError("give exactly one of schedule.train_steps and schedule.train_rows")
        if self.lr_warmup_steps and self.lr_warmup_rows is not None:
            raise ValueError(
                f"give one of schedule.lr_warmup_steps={self.lr_warmup_steps} and "
                f"schedule.lr_warmup_rows={self.lr_warmup_rows}"
            )
        lengths = ("lr_wsd_decay_steps", "lr_wsd_decay_rows", "lr_wsd_decay_fraction")
        given = [key for key in lengths if getattr(self, key) is not None]
        if self.lr_decay_style == "wsd" and len(given) != 1:
            raise ValueError(
                f"schedule.lr_decay_style=wsd needs exactly one of {', '.join(lengths)}; given: "
                f"{', '.join(given) or 'none'}"
            )
        if self.lr_decay_style != "wsd" and given:
            raise ValueError(f"schedule.{given[0]} needs lr_decay_style=wsd; it is {self.lr_decay_style}")
        if self.lr_decay_style == "inverse_square_root" and not (self.lr_warmup_steps or self.lr_warmup_rows):
            raise ValueError(
                "schedule.lr_decay_style=inverse_square_root falls from the end of the warm-up: give "
                "schedule.lr_warmup_steps or schedule.lr_warmup_rows"
            )
        return self


class LossConfig(Section):
    """Cross-entropy over targets."""

    normalization: Literal["target_token", "target_sequence", "target_sequence_per_micro_batch", "dataset"] = (
        "target_sequence"
    )
    """What each term is divided by, over the global batch:
    target_token: every target token counts 1; the sum is divided by the number of target tokens.
    target_sequence: every target counts 1, its tokens 1/len each; divided by the number of targets. T5X, mT0.
    target_sequence_per_micro_batch: the same, divided within each micro-batch, then averaged. BLOOMZ as it ran.
    dataset: the mean over the target tokens of each dataset, then the mean over the datasets that have a target token
    in the global batch. A dataset is a prefix; entries that select parts of one prefix are one dataset. One with few
    tokens in a step weighs as much as one with many: meant for global batches that hold all datasets.
    """


class RecomputeConfig(Section):
    """Which activations are computed again in the backward pass to save memory."""

    granularity: Literal["none", "selective", "full"] = "none"
    """none; selective: attention scores; full: whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """For full: uniform groups of layers, or the first `num_layers` of each stage."""
    num_layers: PositiveInt = 1
    """For full: layers per group (uniform) or per stage (block)."""


class KernelsConfig(Section):
    """Which implementation of each operation runs; decided once at start and printed."""

    attention: Literal["auto", "reference", "sdpa"] = "auto"
    """Packed ALiBi attention. auto: sdpa in fp32, reference in half precision."""


class CheckpointConfig(Section):
    """When checkpoints are written and which one a run starts from."""

    save_interval: PositiveInt | None = None
    """Steps between checkpoints. None: only at the end."""
    keep_last: Annotated[int, Field(ge=2, strict=True)] = 2
    """Newest checkpoints kept, at least 2 (the newest may be the one that is damaged)."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept as well."""
    save_optimizer: bool = True
    """Write optimizer and RNG state. False halves or more the size, and such a checkpoint cannot be resumed."""
    resume: Literal["latest", "none"] | Annotated[int, Field(ge=0, strict=True)] = "latest"
    """latest: go on from the newest checkpoint of `output` if there is one. A step: exactly that one, or an error.
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


class RunConfig(Section):
    """One training run."""

    model: str
    """Hugging Face directory or checkpoint whose weights the run starts from."""
    output: str
    """Directory of the run: `metrics.jsonl`, `config.yaml`, `checkpoints/`, `status.json`."""
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights in forward and backward; gradients accumulate in fp32. bf16: BLOOMZ-176B."""
    recompute: RecomputeConfig = RecomputeConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    """Seed of row order and dropout. 42: BLOOMZ."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        parallel, batch, schedule = self.parallel, self.batch, self.schedule
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        if parallel.sequence_parallel and tp == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1; it is 1")
        if parallel.sequence_parallel and batch.sequence_length % tp:
            raise ValueError(
                f"batch.sequence_length={batch.sequence_length} is not a multiple of "
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
        if schedule.train_rows is not None and schedule.train_rows % batch.global_batch_size:
            raise ValueError(
                f"schedule.train_rows={schedule.train_rows} is not a multiple of "
                f"batch.global_batch_size={batch.global_batch_size}"
            )
        if self.kernels.attention == "sdpa" and self.precision != "fp32":
            raise ValueError(
                f"kernels.attention=sdpa needs precision=fp32, it is {self.precision}: torch would round the ALiBi "
                "bias to it; use auto or reference"
            )
        profile = self.logging.profile
        if profile is not None and profile.start + profile.steps - 1 > self.train_steps:
            raise ValueError(
                f"logging.profile asks for steps {profile.start} to {profile.start + profile.steps - 1}, the run has "
                f"{self.train_steps}"
            )
        if self.optimizer.name == "adafactor" and parallel.use_distributed_optimizer:
            raise ValueError(
                "optimizer.name=adafactor and parallel.use_distributed_optimizer=true cannot be combined: flat shards "
                "have no rows and columns to factor; its state is small, set use_distributed_optimizer=false"
            )
        if schedule.lr_warmup_steps > self.train_steps:
            raise ValueError(
                f"schedule.lr_warmup_steps={schedule.lr_warmup_steps} is more than the run's {self.train_steps} steps"
            )
        rows = self.train_steps * batch.global_batch_size
        if self.warmup_rows + self.wsd_decay_rows > rows:
            raise ValueError(
                f"schedule: warm-up and decay of the learning rate take {self.warmup_rows} and {self.wsd_decay_rows:g} "
                f"rows, the run has {rows}"
            )
        return self

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.schedule.train_steps is not None:
            return self.schedule.train_steps
        assert self.schedule.train_rows is not None, "the schema requires train_steps or train_rows"
        return self.schedule.train_rows // self.batch.global_batch_size

    @property
    def warmup_rows(self) -> int:
        """Rows of the learning rate's warm-up."""
        schedule = self.schedule
        return schedule.lr_warmup_rows or schedule.lr_warmup_steps * self.batch.global_batch_size

    @property
    def wsd_decay_rows(self) -> float:
        """Rows of the decay that ends a wsd schedule; 0 with any other."""
        schedule, batch = self.schedule, self.batch.global_batch_size
        if schedule.lr_wsd_decay_fraction is not None:
            return schedule.lr_wsd_decay_fraction * self.train_steps * batch
        return schedule.lr_wsd_decay_rows or (schedule.lr_wsd_decay_steps or 0) * batch
