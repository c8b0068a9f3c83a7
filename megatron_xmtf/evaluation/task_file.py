"""What a task file says: which questions, in which language, how an answer is judged.

    tasks:
      - name: copa                       # YAML; a bare list of such entries is read as well
        language: id
        records: copa_id.jsonl           # relative to the task file; one object a line: inputs, targets, choices
        metric: accuracy                 # accuracy: rank the choices; exact_match: generate and compare
        limit: 100
      - name: topics
        language: sw
        source: topics_sw.tsv            # or rows of a source rendered with a template file
        templates: topics.yaml
        choices: [science, sports, travel]

A record's own `dataset`, `language`, `template` and `template_language` name it in the results where the task does
not, so that one file may hold many languages and templates: each combination is measured by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_xmtf.config import config_from_mapping, load_yaml
from megatron_xmtf.errors import ConfigError

__all__ = ["GenerationSettings", "TaskSettings", "read_task_file"]

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class GenerationSettings(_Section):
    """How an answer is generated (greedily) before it is compared."""

    max_new_tokens: PositiveInt = 64
    """Tokens after which an answer ends without EOS."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """An answer ends before the first of these strings."""


class TaskSettings(_Section):
    """One entry of a task file."""

    name: Annotated[str, Field(min_length=1)]
    """Name in results; the same task in another language has the same name."""
    language: str | None = None
    """Language of the task. None: each record's own `language`."""
    dataset: str | None = None
    """Dataset in results. None: each record's own `dataset`, or the task's name."""
    template: str | None = None
    """With `records`: name in results, None: each record's own. With `templates`: the one template that is used,
    None: every template of the file."""
    template_language: str | None = None
    """Language of the template in results. None: each record's own, or the task's language."""
    records: str | None = None
    """Prompted records, one JSON object a line, relative to the task file. Give this, or `source` and `templates`."""
    source: str | dict[str, Any] | None = None
    """Rows to be rendered (jsonl, json, csv, tsv), relative to the task file: a path, or a mapping with `path`,
    `format`, `fields`, `columns` … as `prompts.Source` has them."""
    templates: str | None = None
    """Template file for `source`, relative to the task file."""
    metric: Literal["accuracy", "exact_match"] = "accuracy"
    """accuracy: the choice of highest log-probability is the answer. exact_match: the generated text is."""
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = None
    """Choices of every record. None: each record's own `choices`."""
    normalization: Literal["none", "tokens", "characters"] = "none"
    """What a choice's summed log-probability is divided by. none: T0 and BLOOMZ."""
    target_prefix: str = " "
    """Put before each choice, as preprocessing puts it before each target. " ": BLOOMZ."""
    score_eos: bool = False
    """Score the end-of-sequence token behind each choice too. False: BLOOMZ."""
    inputs_eos: bool | None = None
    """End inputs with the end-of-sequence token. None: as the model was trained (`batch.encoder_eos`); true for an
    encoder-decoder whose training is not known, false for a decoder-only model. False: T0's own evaluation."""
    generation: GenerationSettings | None = None
    """For exact_match: how answers are generated. None: the defaults."""
    chance: Fraction | None = None
    """What guessing gives. None: mean of 1 / number of choices; 0 for exact_match."""
    limit: PositiveInt | None = None
    """At most this many records of each language and template, the first ones. None: all."""

    @model_validator(mode="after")
    def _consistent(self) -> TaskSettings:
        if (self.records is None) == (self.source is None):
            raise ValueError(f"task {self.name!r}: give exactly one of `records` and `source`")
        if (self.source is None) != (self.templates is None):
            raise ValueError(f"task {self.name!r}: `source` and `templates` go together")
        if self.metric != "accuracy" and self.choices is not None:
            raise ValueError(f"task {self.name!r}: `choices` are ranked by metric accuracy; {self.metric} has none")
        if self.metric == "accuracy" and self.generation is not None:
            raise ValueError(f"task {self.name!r}: `generation` is for metric exact_match; accuracy ranks choices")
        return self


class _TaskFile(_Section):
    tasks: list[TaskSettings] = Field(min_length=1)


def read_task_file(path: Path) -> list[TaskSettings]:
    """Read and validate a task file.

    Raises:  MissingError: no such file. ConfigError: not YAML, unknown key or metric (names the nearest).
    """
    values = load_yaml(path)
    if isinstance(values, list):
        values = {"tasks": values}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a task file is a list of tasks, or `tasks:`.")
    return config_from_mapping(values, _TaskFile, source=str(path)).tasks
