"""Build a mixture out of its configuration and its datasets: select, fit, divide by columns, cap, pinch.

entries (nested)  --select, fit-->  examples of each dataset  --by, floors-->  components  +  the tree of their shares
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.mixture import EachConfig, MixtureConfig, MixtureEntry, PinchConfig, SelectionConfig, Source
from megatron_xmtf.config.objective import ObjectiveConfig
from megatron_xmtf.config.row_lengths import RowLengths, word_lengths
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples, LeftOut, LongExamples, fit_examples, require_examples
from megatron_xmtf.data.mixture import Component, Mixture
from megatron_xmtf.data.pinch import Pool, draw_pinch, require_documents
from megatron_xmtf.data.selection import choose_examples, combinations, select_examples
from megatron_xmtf.data.shares import Floor, ShareNode
from megatron_xmtf.errors import ConfigError, DatasetError

__all__ = ["build_mixture"]


def build_mixture(
    datasets: Sequence[ExampleDataset],
    mixture: MixtureConfig,
    *,
    sequence_length: RowLengths,
    long_examples: LongExamples = "drop",
    split_seed: int = 0,
    excluded: Sequence[NDArray[np.bool_] | None] | None = None,
) -> Mixture:
    """Build a mixture.

    Args:    datasets: those of `mixture.sources()`, in that order. split_seed: `data.split_seed`.
             excluded: for each dataset bool [examples], examples that are not read (duplicates ...), or None.
    Raises:  ConfigError: a selection that matches nothing, weights that name no part, floors that cannot be met.
             DatasetError: a dataset has no example that fits, no such column, or no document numbers for a pinch.
    """
    sources = mixture.sources()
    assert len(sources) == len(datasets), f"{len(sources)} sources in the mixture, {len(datasets)} datasets"
    builder = _Builder(
        datasets=datasets,
        number_of={source: number for number, source in enumerate(sources)},
        mixture=mixture,
        sequence_length=sequence_length,
        long_examples=long_examples,
        split_seed=split_seed,
        excluded=list(excluded) if excluded is not None else [None] * len(datasets),
    )
    return builder.build()


@dataclass(frozen=True)
class _Inherited:
    """What the groups around an entry hand down to it."""

    selections: tuple[SelectionConfig, ...]
    split: str | None
    each: EachConfig
    objective: ObjectiveConfig | None
    path: str

    def inside(self, entry: MixtureEntry) -> _Inherited:
        return _Inherited(
            selections=(*self.selections, entry),
            split=entry.split or self.split,
            each=_nearest(entry.each, self.each),
            objective=entry.objective or self.objective,
            path=f"{self.path}{entry.label}/",
        )


def _nearest(own: EachConfig | MixtureEntry, around: EachConfig) -> EachConfig:
    values = {name: getattr(own, name) for name in EachConfig.model_fields}
    return EachConfig(**{name: getattr(around, name) if value is None else value for name, value in values.items()})


@dataclass
class _Builder:
    datasets: Sequence[ExampleDataset]
    number_of: dict[Source, int]
    mixture: MixtureConfig
    sequence_length: RowLengths
    long_examples: LongExamples
    split_seed: int
    excluded: list[NDArray[np.bool_] | None]
    components: list[Component] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    labels: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(column, name) -> components that consist of it, for the columns that have floors."""

    def build(self) -> Mixture:
        self.left_out = [LeftOut() for _ in self.datasets]
        top = _Inherited((self.mixture,), self.mixture.split, self.mixture.each, None, "")
        pinched = self._pinch(self.mixture.pinch) if self.mixture.pinch else []
        root = ShareNode(temperature=self.mixture.temperature)
        root.children = [self._node(entry, top, pinched) for entry in self.mixture.entries]
        for (column, name), members in sorted(self.labels.items()):
            floor = self.mixture.floors[column]  # type: ignore[index]  # labels hold columns of `floors` only
            self.floors.append(Floor(f"{column} {name}", np.array(members), floor))
        if not any(len(component.examples) for component in self.components):
            raise DatasetError(
                f"none of the {sum(map(len, self.datasets))} examples of {len(self.datasets)} datasets fits a row of "
                f"{word_lengths(self.sequence_length)}, or all are left out by the mixture's selection. "
                "Make rows longer, set long_examples to truncate_inputs_left, or take other data."
            )
        return Mixture(self.components + pinched, root, self.floors, self.mixture.unit, self.left_out)

    def _node(self, entry: MixtureEntry, around: _Inherited, pinched: Sequence[Component]) -> ShareNode:
        """Build an entry's part of the tree; its components are appended in the order of the leaves."""
        first = len(self.components)
        inside = around.inside(entry)
        if entry.entries:
            children = [self._node(child, inside, pinched) for child in entry.entries]
            node = ShareNode(
                children=children, weight=entry.weight, cap=entry.cap, temperature=entry.temperature or 1.0
            )
        else:
            node = self._dataset(entry, inside, pinched)
        if entry.floor:
            members = np.arange(first, len(self.components))
            self.floors.append(Floor(inside.path.rstrip("/"), members, entry.floor))
        return node

    def _dataset(self, entry: MixtureEntry, inside: _Inherited, pinched: Sequence[Component]) -> ShareNode:
        assert entry.prefix is not None, "the schema asks for a prefix or entries"
        number = self.number_of[Source(entry.prefix, inside.objective)]
        dataset, name = self.datasets[number], inside.path.rstrip("/")
        chosen = self._chosen(number, inside.selections, inside.split)
        if pinched:
            taken = [require_documents(self.datasets[part.dataset])[part.examples.ids] for part in pinched]
            free = ~np.isin(require_documents(dataset), np.concatenate(taken))
            chosen = free if chosen is None else chosen & free
        if not entry.by:
            examples = self._fit(number, chosen)
            if entry.weight is not None or len(self.datasets) == 1:
                require_examples(dataset, examples, sequence_length=self.sequence_length)
            node = self._leaf(name, number, examples, _nearest(entry, inside.each))
            node.weight = entry.weight
            return node
        examples = self._fit(number, chosen)
        parts = combinations(dataset, entry.by, examples.ids)
        if entry.weights and set(entry.weights) != {names[0] for names in parts}:
            raise ConfigError(
                f"weights of {name!r} name {', '.join(sorted(entry.weights))}, but its {entry.by[0]}s are "
                f"{', '.join(names[0] for names in parts)}; give a weight to each, and to no other."
            )
        node = ShareNode(weight=entry.weight, cap=entry.cap, temperature=entry.temperature or 1.0)
        for names, positions in parts.items():
            child = self._leaf(f"{name}[{','.join(names)}]", number, examples.only(positions), inside.each)
            child.weight = entry.weights.get(names[0])
            node.children.append(child)
        return node

    def _leaf(self, name: str, number: int, examples: FittingExamples, settings: EachConfig) -> ShareNode:
        """Append a component, or one for each name of the columns that have floors."""
        if settings.max_examples is not None and settings.max_examples < len(examples):
            examples = examples.only(choose_examples(len(examples), settings.max_examples, seed=self.split_seed))
        columns = list(self.mixture.floors)
        if not columns:
            return self._component(name, number, examples, settings, cap=settings.cap)
        parts = combinations(self.datasets[number], columns, examples.ids)
        node = ShareNode(cap=settings.cap)
        for names, positions in parts.items():
            for column, label in zip(columns, names, strict=True):
                if label:
                    self.labels.setdefault((column, label), []).append(len(self.components))
            part_name = name if len(parts) == 1 else f"{name}[{','.join(names)}]"
            node.children.append(self._component(part_name, number, examples.only(positions), settings, cap=None))
        return node

    def _component(
        self, name: str, number: int, examples: FittingExamples, settings: EachConfig, *, cap: float | None
    ) -> ShareNode:
        component = Component(
            name=name,
            dataset=number,
            examples=examples,
            unit_size=self._unit_size(examples),
            max_epochs=settings.max_epochs,
        )
        self.components.append(component)
        return ShareNode(size=len(examples) * component.unit_size, cap=cap)

    def _unit_size(self, examples: FittingExamples) -> float:
        if self.mixture.unit == "examples" or not len(examples):
            return 1.0
        sizes = examples.lengths if self.mixture.unit == "tokens" else examples.target_tokens
        return float(np.mean(sizes, dtype=np.float64))

    def _chosen(
        self, number: int, selections: Sequence[SelectionConfig], split: str | None
    ) -> NDArray[np.bool_] | None:
        chosen = select_examples(self.datasets[number], selections, split=split, split_seed=self.split_seed)
        excluded = self.excluded[number]
        if excluded is None:
            return chosen
        return ~excluded if chosen is None else chosen & ~excluded

    def _fit(self, number: int, chosen: NDArray[np.bool_] | None) -> FittingExamples:
        examples = fit_examples(
            self.datasets[number],
            sequence_length=self.sequence_length,
            long_examples=self.long_examples,
            chosen=chosen,
        )
        self.left_out[number] += examples.left_out
        return examples

    def _pinch(self, pinch: PinchConfig) -> list[Component]:
        split = pinch.split or self.mixture.split
        numbers = [self.number_of[Source(prefix, None)] for prefix in pinch.prefixes]
        pools = [
            Pool(number, self.datasets[number], self._fit(number, self._chosen(number, [pinch], split)))
            for number in numbers
        ]
        return [
            Component(f"pinch[{language}]", number, examples, self._unit_size(examples), fixed=True)
            for language, number, examples in draw_pinch(pinch, pools, seed=self.split_seed)
        ]
