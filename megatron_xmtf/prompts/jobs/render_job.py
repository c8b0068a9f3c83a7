"""What a render job is: which rows, worded by which templates, in which variants, into which files.

    name: xp3                            # files are named <language>/<name>_<dataset>_<config>_<split>_<template>.jsonl
    seed: 42
    output_directory: rendered           # relative to the job file; --output-directory goes before it
    prompts: both                        # english (xP3) | localised (xP3mt) | both
    variants: [plain, 3shot, options]    # plain | <k>shot | options | letters | cot, joined by +
    max_records_per_template: 100000     # xP3's cap per dataset, config, split and template
    entries:
      - dataset: xcopa
        config: "{language}"
        split: validation
        languages: [et, sw, zh]          # or {zho_Hans: zh}: the rows' code and the prompts' code; or see `languages`
        task: causal_choice
        source: {path: "xcopa/{language}/val.jsonl", fields: {id: idx}}
        templates: {english: "templates/xcopa/en.yaml", localised: "templates/xcopa/{prompt_language}.yaml"}
        exemplars: {source: "copa/train.jsonl", split: train}

    language    rows of         templates of                     record's language, template_language
    et          val.jsonl (et)  en.yaml, and et.yaml of it       et, en        et, et
    zh          val.jsonl (zh)  en.yaml, and zh.yaml of it       zh, en        zh, zh

`{language}`, `{prompt_language}` and the entry's own names are replaced in `config`, in the sources and in paths of
templates. The schema refuses
unknown keys, and a job is checked whole before the first row is read: its files exist, its templates are found, no
two outputs have the same name, no exemplar comes from other than training rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_xmtf.config.load import config_from_mapping, load_yaml
from megatron_xmtf.config.section import PositiveInt, Section
from megatron_xmtf.errors import ConfigError

__all__ = ["EntrySettings", "ExemplarSettings", "RenderJob", "TemplateFiles", "load_render_job"]

Prompts = Literal["english", "localised", "both"]
Missing = Literal["error", "english", "skip"]
Translation = Literal["any", "human", "machine"]
SourceValue = str | dict[str, Any]
OptionStyleValue = str | dict[str, str]
PLACEHOLDER_NAME = re.compile(r"[a-z][a-z_]*")
TRAINING_SPLIT = re.compile(r"^train($|[^a-z])")
TEST_SPLIT = re.compile(r"(^|[^a-z])test($|[^a-z])")


class ExemplarSettings(Section):
    """Where the exemplars of few-shot variants come from."""

    source: SourceValue | list[SourceValue] | None = None
    """Rows to draw from, as `source` of an entry. None: the entry's own rows, if its split is a training split."""
    split: str = "train"
    """What the rows of `source` are. It must be a training split: `train`, or `train` and a mark (`train_r1`)."""
    pool: PositiveInt = 1000
    """Rows kept of the source, chosen by hash of seed and id; draws are made among them."""
    max_characters: PositiveInt = 6000
    """Characters that the exemplars of one record may have together, delimiters included. 6000: some 1,500 to 2,500
    tokens, about Flan's 1,920."""

    @field_validator("split")
    @classmethod
    def _training_rows(cls, split: str) -> str:
        if not TRAINING_SPLIT.match(split):
            raise ValueError(f"exemplars are drawn from training rows only, and split {split!r} is not `train`")
        return split


class TemplateFiles(Section):
    """Template files of an entry, one for English prompts and one for those in the language of the rows."""

    english: str | None = None
    localised: str | None = None
    """`{prompt_language}` stands for the language."""

    @model_validator(mode="after")
    def _at_least_one(self) -> TemplateFiles:
        if self.english is None and self.localised is None:
            raise ValueError("name a file of `english` or of `localised` templates")
        return self


class _Rendering(Section):
    """Keys that stand in the job for all entries, or in an entry for itself."""

    prompts: Prompts | None = None
    """Language of the prompts: English (xP3), that of the rows (xP3mt), or both. Default: english."""
    missing: Missing | None = None
    """When a language has no localised template. english: take the English ones; skip: leave the language out;
    both are counted. Default: error."""
    translation: Translation | None = None
    """Which translated templates are taken; `any` takes those that were written in the language too. Default: any."""
    variants: list[str] | None = None
    """How each template is posed. Default: [plain]."""
    max_records_per_template: PositiveInt | None = None
    """Records kept of each output file, chosen by hash of seed, template and id. Default: all. xP3 has 100,000."""
    limit: PositiveInt | None = None
    """Rows read of each source, for a trial. Default: all."""
    on_error: Literal["raise", "skip"] | None = None
    """skip: count unreadable rows and failing templates, and go on. Default: raise."""
    option_styles: list[OptionStyleValue] | None = None
    """Styles that option lists are drawn from (`options.py`). Default: all that suit the template's language."""
    delimiters: list[OptionStyleValue] | None = None
    """Styles that exemplars are set apart by (`delimiters.py`). Default: all that suit the template's language."""


class EntrySettings(_Rendering):
    """One dataset: its rows in one or more languages, and the templates for them."""

    dataset: str = Field(min_length=1)
    config: str | None = None
    """Subset of the dataset; in file names `None` when there is none, as in xP3."""
    split: str = Field(min_length=1)
    source: SourceValue | list[SourceValue]
    """A path, or a mapping of `Source`'s fields (sources.py); several are read one after the other."""
    templates: str | TemplateFiles
    """One file that holds all templates, or one for each language of the prompts."""
    language: str | None = None
    """Language of the rows. Give this or `languages`."""
    languages: list[str] | dict[str, str | dict[str, str]] | None = None
    """Languages of the rows, `{language}` in sources; as a mapping, with the code that the templates have for each, or
    with that and further names: `{swh_Latn: {prompt: sw, path: swa}}` makes `{path}` stand for swa."""
    task: str | None = None
    include: list[str] = ["*"]
    """Names of templates to take; `*` stands for anything."""
    exclude: list[str] = []
    """Names of templates to leave out of these."""
    exemplars: ExemplarSettings | None = None

    @model_validator(mode="after")
    def _one_way_to_say_the_language(self) -> EntrySettings:
        if (self.language is None) == (self.languages is None):
            raise ValueError("give exactly one of language and languages")
        if self.languages is not None and not self.languages:
            raise ValueError("languages is empty")
        return self

    @model_validator(mode="after")
    def _the_same_names_for_each_language(self) -> EntrySettings:
        names = {language: set(values) - {"prompt"} for language, values in self.language_names().items()}
        every = set().union(*names.values())
        for language, given in names.items():
            for name in sorted(every - given):
                raise ValueError(f"languages: {language} gives no `{name}`, which another language gives")
        for name in sorted(every):
            if not PLACEHOLDER_NAME.fullmatch(name) or name in ("language", "prompt_language"):
                raise ValueError(f"languages: {name!r} is no name of a placeholder; take small letters and _")
        return self

    def language_names(self) -> dict[str, dict[str, str]]:
        """Return language of the rows -> what stands for the names of it; `prompt` is the language of the prompts."""
        if isinstance(self.languages, dict):
            return {
                language: {"prompt": given} if isinstance(given, str) else dict(given)
                for language, given in self.languages.items()
            }
        return {language: {} for language in self.languages or [str(self.language)]}


class RenderJob(_Rendering):
    """A whole job."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "xp3"
    """First part of the names of the files."""
    seed: int = 0
    """Of everything that is drawn: exemplars, styles, caps, the templates' own choices."""
    output_directory: str | None = None
    """Where the files go, relative to the job file."""
    allow_test_splits: bool = False
    """Render test splits too. xP3 trained on them; a job for training should not, one for evaluation must."""
    entries: list[EntrySettings] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_test_splits(self) -> RenderJob:
        for entry in self.entries:
            if TEST_SPLIT.search(entry.split.lower()) and not self.allow_test_splits:
                raise ValueError(
                    f"{entry.dataset}: split {entry.split!r} is a test split, which is not trained on; for a job that "
                    "renders evaluation data say allow_test_splits: true"
                )
        return self


def load_render_job(path: Path | str) -> RenderJob:
    """Read a job file.

    Raises:  MissingError: no such file. ConfigError: not YAML, an unknown key, a rule broken.
    """
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a render job is a mapping of keys with `entries`.")
    return config_from_mapping(values, RenderJob, source=str(path))
