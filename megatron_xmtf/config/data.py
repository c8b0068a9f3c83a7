"""Keys of `data`: which examples are read, how they are guarded and packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_xmtf.config.mixture import ColumnName, MixtureConfig, MixtureEntry, SelectionConfig, check_weights
from megatron_xmtf.config.objective import Objective, ObjectiveConfig
from megatron_xmtf.config.section import Fraction, PositiveInt, Section

__all__ = ["DataConfig", "DatasetConfig", "GuardsConfig"]


class DatasetConfig(SelectionConfig):
    """One indexed dataset, or a part of it."""

    prefix: str
    """Path prefix of the indexed files: `<prefix>_inputs_document.idx` or `<prefix>_text_document.idx`."""
    name: str | None = None
    """Name in reports. Default: the last part of `prefix`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Relative number of examples drawn from this dataset. None for all: each example once an epoch."""
    objective: Objective | None = None
    """What examples are made of the documents of a text dataset. None: inputs and targets as they are, texts whole."""


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
        return [
            DatasetConfig(prefix=mixture.path(source.prefix), name=name, objective=source.objective)
            for source, name in names.items()
        ]

    @property
    def validation_datasets(self) -> list[DatasetConfig]:
        """The validation datasets: those named, or what the mixture holds out."""
        mixture = self.mixture
        if self.validation or mixture is None or mixture.validation is None:
            return self.validation
        names = mixture.dataset_names()
        held_out: list[DatasetConfig] = []
        for source, selections, _ in mixture.selections():
            entry = DatasetConfig(
                prefix=mixture.path(source.prefix),
                objective=source.objective,
                split=mixture.validation,
                where={column: patterns for one in selections for column, patterns in one.where.items()},
                exclude=_union(one.exclude for one in selections),
            )
            if entry not in held_out:
                held_out.append(entry)
        # A dataset that several entries read in parts is measured in those parts, told apart by a number.
        part_of = Counter((entry.prefix, entry.objective) for entry in held_out)
        name_of = {(mixture.path(source.prefix), source.objective): name for source, name in names.items()}
        number: Counter[tuple[str, ObjectiveConfig | None]] = Counter()
        named = []
        for entry in held_out:
            key = (entry.prefix, entry.objective)
            number[key] += 1
            part = f"#{number[key]}" if part_of[key] > 1 else ""
            named.append(entry.model_copy(update={"name": name_of[key] + part}))
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
