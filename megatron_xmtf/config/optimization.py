"""Keys of `optimizer`, `schedule`, `loss` and `dropout`: what a step does to the weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_xmtf.config.section import Fraction, PositiveInt, Section

__all__ = ["DropoutConfig", "LossConfig", "OptimizerConfig", "ScheduleConfig"]


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
    offload: Literal["none", "cpu"] = "none"
    """cpu: AdamW's moments live in the CPU's memory and are updated there: 8 bytes a number off the GPU, for 12
    bytes a number over its bus every step. The same updates; where there is no GPU they live there anyway. Not with
    adafactor, whose state is small."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_adafactor(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "adafactor":
            return {"lr": 1e-3, "weight_decay": 0.0, "clip_grad": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _only_adamw_is_offloaded(self) -> OptimizerConfig:
        if self.name == "adafactor" and self.offload != "none":
            raise ValueError(
                f"offload={self.offload} cannot be combined with name: adafactor: its state is a row and a column of "
                "each matrix; leave offload out"
            )
        return self

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
    """Rows in all, a whole number of steps. Give this or `train_steps`."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse_square_root", "wsd"] = "constant"
    """Shape after warm-up. constant: BLOOMZ, mT0. linear, cosine: down to `min_lr` at the last step.
    inverse_square_root: by the root of (warm-up / now). wsd (warm-up, stable, decay): constant, then a decay of
    `lr_wsd_decay_*` at the end."""
    lr_warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps over which the rate rises linearly from 0; counted as their rows. 0: BLOOMZ."""
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
    non_finite: Literal["error", "skip"] = "error"
    """What a NaN or Inf in the loss or a gradient does, before any weight is touched. error: the run ends with exit
    code 7. skip: the step's rows are passed over on all ranks. Either way `OUT/bad_steps.jsonl` names the examples. An
    fp16 overflow of gradients is neither: the loss scale falls."""
    max_skipped_steps: PositiveInt = 10
    """Steps that `non_finite: skip` and `spike_window` may pass over in the whole run; one more ends it with exit code
    7. 10: ours; a healthy run skips none."""
    spike_window: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Steps whose mean and standard deviation a loss is held against; one too far above is a spike, and its step is
    passed over before the update. None: no step is. Skipping the data around a spike is PaLM's cure (Chowdhery et al.
    2022, arXiv:2204.02311, section 5.1), who went back 100 steps and skipped 200 to 500 batches by hand."""
    spike_deviations: Annotated[float, Field(gt=0)] = 6.0
    """Standard deviations above the mean of `spike_window` from which a loss is a spike. 6: ours; of normal noise one
    step in 10^9."""
    spike_skip_steps: PositiveInt = 1
    """Steps passed over from a spike on, itself included."""


class DropoutConfig(Section):
    """Dropout while training, in place of what the model's own configuration says."""

    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of hidden states dropped: behind the embedding, and of what attention and feed-forward add to the residual.
    None: the model's own, 0.0 in the config.json of every BLOOM. 0.1: BLOOMZ, as Megatron's default."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of attention probabilities dropped. As `hidden_dropout`."""
