"""A mixture: which examples a run draws, and how many of each kind. Nested groups of datasets, each with its share.

    unit: examples                        what shares, caps, floors count: examples, tokens, target_tokens
    split: "0:0.95"                       documents that are trained on; `validation: "0.95:1"` are held out
    temperature: 1.0
    entries:
      - name: qa                          a group: 3 of 4 parts, its datasets by size
        weight: 3
        each: {cap: 30000}                settings of every dataset in it
        entries:
          - prefix: data/squad            90,000 examples, count as 30,000:   share 3/4 * 30/40
          - prefix: data/tydiqa           10,000 examples:                    share 3/4 * 10/40
      - prefix: data/topics               1 of 4 parts, one component for each language
        weight: 1
        by: [language]
        temperature: 2                    its languages by the square root of their size
        where: {language: [sw, th, hi]}
        max_epochs: 4                     over the whole run, no example more than 4 times
    floors: {language: 0.01}              no language is less than 1 % of the whole

    key           of            means
    weight        entry         its part relative to its siblings' weights; all siblings have one or none has
    (no weight)   entry         its part is size ** (1 / temperature), the temperature being the group's
    cap           entry         its size counts as this at most (T5's "mixing rate maximum"); in `unit`
    max_examples  entry         of its examples only this many are used at all, a choice that stays the same for ever
    max_epochs    entry         draws of an example over the whole run; what is used up leaves its part to others
    floor         entry         its part of the whole mixture is at least this fraction
    floors        mixture       the same for every language, task ... (any column)
    objective     entry         what becomes of plain documents (`objective.py`); of a group: of all datasets in it

The same documents may be read under several objectives, each an entry of its own: AlexaTM's 80 % and 20 % are weights.
Flan 2022 is group weights with capped sizes; xP3 is weights alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction as Exact
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from megatron_xmtf.config.objective import Objective, ObjectiveConfig
from megatron_xmtf.config.section import Fraction, PositiveInt, Section

__all__ = [
    "ColumnName",
    "EachConfig",
    "MixtureConfig",
    "MixtureEntry",
    "PinchConfig",
    "SelectionConfig",
    "Source",
    "Unit",
    "parse_interval",
]

ColumnName = Literal["language", "dataset", "config", "split", "template", "template_language", "task"]
Unit = Literal["examples", "tokens", "target_tokens"]
Positive = Annotated[float, Field(gt=0)]


def parse_interval(text: str) -> tuple[Exact, Exact]:
    """Read an interval of documents, exactly: intervals that share only an end share no document.

    >>> parse_interval("0:0.95")
    (Fraction(0, 1), Fraction(19, 20))

    Raises:  ValueError: not "FROM:TO" with 0 <= FROM < TO <= 1.
    """
    begin, separator, end = text.partition(":")
    try:
        interval = Exact(begin.strip()), Exact(end.strip())
    except (ValueError, ZeroDivisionError):
        separator = ""
    if not separator or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f'{text!r} is not an interval of documents "FROM:TO" with 0 <= FROM < TO <= 1, as "0:0.95"')
    return interval


def _interval(value: Any) -> Any:
    if isinstance(value, str):
        parse_interval(value)
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Interval = Annotated[str, BeforeValidator(_interval)]
Patterns = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), Field(min_length=1)]


class SelectionConfig(Section):
    """Which examples of the data below are read; on a group it holds for everything in it."""

    split: Interval | None = None
    """Documents that are read, as an interval of [0, 1): "0:0.95". Which document lies where follows from a hash of it,
    so renderings of one source row, and its translations, are never torn apart. None: that of the group, or all."""
    where: dict[ColumnName, Patterns] = {}
    """Column -> names that are read, `*` and `?` allowed: {language: [sw, th], template: "*+cot"}."""
    exclude: dict[ColumnName, Patterns] = {}
    """Column -> names that are not read."""


class EachConfig(Section):
    """Settings that every dataset below has unless it says otherwise; the nearest group wins."""

    cap: Positive | None = None
    """See `MixtureEntry.cap`."""
    max_examples: PositiveInt | None = None
    """See `MixtureEntry.max_examples`."""
    max_epochs: Positive | None = None
    """See `MixtureEntry.max_epochs`."""


class MixtureEntry(SelectionConfig):
    """A dataset (`prefix`) or a group (`entries`)."""

    name: str | None = None
    """Name in plans and reports. Default: the last part of `prefix`."""
    prefix: str | None = None
    """Path prefix of indexed files, relative to the mixture's `root`."""
    entries: list[MixtureEntry] = []
    """What a group consists of."""
    by: Annotated[list[ColumnName], BeforeValidator(_as_list)] = []
    """Makes the dataset a group with one component for each combination of names in these columns."""
    weights: dict[str, Positive] = {}
    """With one column in `by`: weight of each of its names; all of them, or none."""
    weight: Positive | None = None
    """Part relative to the siblings. None: the size, capped, to the power of 1 / temperature of the group."""
    cap: Positive | None = None
    """Largest size that counts, in the mixture's `unit` (FLAN 2021: 3,000 examples)."""
    max_examples: PositiveInt | None = None
    """Examples used at most (xP3: 100,000 of each dataset and template)."""
    temperature: Positive | None = None
    """Of a group: 1 is proportional to size, larger is nearer to equal parts. None: 1."""
    max_epochs: Positive | None = None
    """Times that an example is drawn at most, over the whole run."""
    floor: Fraction | None = None
    """Smallest fraction of the whole mixture, in `unit`."""
    objective: Objective | None = None
    """What examples are made of the documents of a text dataset; of a group: of every dataset in it that does not say
    otherwise. None: as the group around it; without any, inputs and targets as they are, texts whole."""
    each: EachConfig = EachConfig()
    """Settings of every dataset, or every component of `by`, below."""

    @model_validator(mode="after")
    def _one_kind(self) -> MixtureEntry:
        what = f"entry {self.name or self.prefix or '?'!r}"
        if (self.prefix is None) == (not self.entries):
            raise ValueError(f"{what} needs either `prefix` (a dataset) or `entries` (a group)")
        if self.by and self.prefix is None:
            raise ValueError(f"{what}: `by` divides a dataset; a group is divided by its entries")
        if self.weights and (len(self.by) != 1 or self.each.cap or self.temperature):
            raise ValueError(
                f"{what}: `weights` needs one column in `by`, and no each.cap and no temperature beside it"
            )
        if self.temperature is not None and not self.entries and not self.by:
            raise ValueError(f"{what}: `temperature` is for a group or a dataset with `by`; set it on the group above")
        if self.max_epochs is not None and (self.entries or self.by):
            raise ValueError(f"{what}: `max_epochs` is counted for each dataset; use each: {{max_epochs: ...}}")
        if self.max_examples is not None and (self.entries or self.by):
            raise ValueError(f"{what}: `max_examples` is counted for each dataset; use each: {{max_examples: ...}}")
        check_weights(self.entries, what)
        return self

    @property
    def label(self) -> str:
        """Name in plans: the given one, or the last part of the prefix."""
        return self.name or Path(self.prefix or "group").name


class PinchConfig(SelectionConfig):
    """A few examples of further languages put into every pass, no document in two languages or in the rest.

    Source:  Shaham et al. 2024, "Multilingual Instruction Tuning With Just a Pinch of Multilinguality" (2401.01854).
    """

    prefixes: list[str] = Field(min_length=1)
    """Datasets that the examples come from; their records need a language and an id."""
    languages: list[str] = []
    """Languages that get a part, in the order in which a remainder is given out. Default: all that there are."""
    examples: PositiveInt | None = None
    """Examples in all, divided evenly over the languages. Give this or `examples_per_language`."""
    examples_per_language: PositiveInt | None = None
    """Examples of each language."""

    @model_validator(mode="after")
    def _one_count(self) -> PinchConfig:
        if (self.examples is None) == (self.examples_per_language is None):
            raise ValueError("pinch needs exactly one of `examples` (in all) and `examples_per_language`")
        if self.examples is not None and self.examples < len(self.languages):
            raise ValueError(f"pinch: {self.examples} examples cannot give each of {len(self.languages)} languages one")
        return self


class Source(NamedTuple):
    """A dataset of a mixture: documents read under two objectives are two."""

    prefix: str
    objective: ObjectiveConfig | None


class MixtureConfig(SelectionConfig):
    """Everything that decides which examples are drawn; see the module's table."""

    name: str | None = None
    """Name in reports."""
    source: str | None = None
    """Where the numbers come from; for the reader."""
    root: str | None = None
    """Directory that prefixes are relative to. Default: the working directory."""
    unit: Unit = "examples"
    """What sizes, weights, caps, floors and temperatures count. Weights of tokens: a component's part of all tokens."""
    temperature: Positive = 1.0
    """Of the entries without weight at the top."""
    entries: list[MixtureEntry] = Field(min_length=1)
    """Datasets and groups."""
    each: EachConfig = EachConfig()
    """Settings of every dataset that does not say otherwise."""
    floors: dict[ColumnName, Fraction] = {}
    """Column -> smallest fraction of the whole mixture that each of its names has."""
    validation: Interval | None = None
    """Documents held out of every dataset for the validation loss; must not overlap what is trained on."""
    pinch: PinchConfig | None = None
    """Examples of further languages added to every pass."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        check_weights(self.entries, "the mixture")
        for source, selections, _ in self.selections():
            for column, times in Counter(column for one in selections for column in one.where).items():
                if times > 1:
                    raise ValueError(
                        f"dataset {source.prefix!r}: `where` names {column} on the dataset and on a group around it; "
                        "say in one of them which are read"
                    )
        if self.validation is not None:
            held_out = parse_interval(self.validation)
            for text in sorted({self.split or "0:1", *_splits(self.entries, self.split)}):
                interval = parse_interval(text)
                if interval[0] < held_out[1] and held_out[0] < interval[1]:
                    raise ValueError(
                        f"validation {self.validation!r} overlaps the documents {text!r} that are trained on"
                    )
        return self

    def prefixes(self) -> list[str]:
        """Return every prefix once, in the order of first appearance, those of the pinch last."""
        return list(dict.fromkeys(source.prefix for source in self.sources()))

    def sources(self) -> list[Source]:
        """Return every prefix with its objective once, in the order of first appearance, those of the pinch last."""
        return list(self.dataset_names())

    def dataset_names(self) -> dict[Source, str]:
        """Return a name for each dataset: the entry's own if it alone reads that, else the prefix's last part, or all
        of the prefix where last parts are equal; the objective's name follows: wiki:causal."""
        given: dict[Source, list[str | None]] = {}
        for entry, objective in _datasets(self.entries):
            assert entry.prefix is not None, "a dataset has a prefix"
            given.setdefault(Source(entry.prefix, objective), []).append(entry.name)
        for prefix in self.pinch.prefixes if self.pinch else ():
            given.setdefault(Source(prefix, None), [None])
        own = {source: names[0] if len(names) == 1 else None for source, names in given.items()}
        short = {source: name or _labelled(Path(source.prefix).name, source) for source, name in own.items()}
        times = Counter(name for name, _ in {(name, source.prefix) for source, name in short.items()})
        named = {
            source: name
            if own[source] or times[name] == 1
            else _labelled(source.prefix.strip("/").replace("/", "_"), source)
            for source, name in short.items()
        }
        return _numbered(named, own)

    def selections(self) -> Iterator[tuple[Source, list[SelectionConfig], str | None]]:
        """Yield each dataset, the conditions on it and around it, and its interval of documents; a dataset may come
        several times, and those of the pinch come last."""

        def walk(
            entries: list[MixtureEntry],
            around: list[SelectionConfig],
            split: str | None,
            objective: ObjectiveConfig | None,
        ) -> Iterator[tuple[Source, list[SelectionConfig], str | None]]:
            for entry in entries:
                own = entry.objective or objective
                if entry.prefix is not None:
                    yield Source(entry.prefix, own), [*around, entry], entry.split or split
                yield from walk(entry.entries, [*around, entry], entry.split or split, own)

        yield from walk(self.entries, [self], self.split, None)
        if self.pinch is not None:
            for prefix in self.pinch.prefixes:
                yield Source(prefix, None), [self.pinch], self.pinch.split or self.split

    def path(self, prefix: str) -> str:
        """Return where a prefix lies."""
        return prefix if self.root is None else str(Path(self.root) / prefix)


def check_weights(entries: list[MixtureEntry], what: str) -> None:
    """Refuse siblings of which some have a weight and some have none."""
    missing = [entry.label for entry in entries if entry.weight is None]
    if missing and len(missing) < len(entries):
        raise ValueError(
            f"{what}: {len(entries) - len(missing)} of {len(entries)} entries have a weight; give a weight to all or "
            f"to none (missing: {', '.join(missing[:3])})"
        )


def _datasets(
    entries: list[MixtureEntry], objective: ObjectiveConfig | None = None
) -> Iterator[tuple[MixtureEntry, ObjectiveConfig | None]]:
    """Yield each dataset with its objective, its own or the nearest group's."""
    for entry in entries:
        own = entry.objective or objective
        if entry.entries:
            yield from _datasets(entry.entries, own)
        else:
            yield entry, own


def _labelled(name: str, source: Source) -> str:
    return name if source.objective is None else f"{name}:{source.objective.name}"


def _numbered(named: dict[Source, str], own: dict[Source, str | None]) -> dict[Source, str]:
    """Tell apart several settings of one objective on one prefix: wiki:span_corruption, wiki:span_corruption#2."""
    number: Counter[str] = Counter()
    found = {}
    for source, name in named.items():
        number[name] += 1
        is_second = number[name] > 1 and not own[source] and source.objective is not None
        found[source] = f"{name}#{number[name]}" if is_second else name
    return found


def _splits(entries: list[MixtureEntry], inherited: str | None) -> list[str]:
    """Return the interval of every dataset below."""
    found = []
    for entry in entries:
        split = entry.split or inherited
        found += _splits(entry.entries, split) if entry.entries else [split or "0:1"]
    return found
