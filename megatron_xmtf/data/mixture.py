"""Which examples of which dataset a run draws, pass after pass over its mixture.

    component   examples   part     a pass draws
    A           6000       none     all 6000, B all 4000: every example once
    B           4000       none
    A           6000       1/4      1333: with B's 4000 that is the longest pass in which no example comes twice
    B           4000       3/4      4000

Parts are rounded by largest remainder. Each component is read round after round, every round in a new random order,
and a pass goes on where the one before it stopped (`rounds.py`). A pass is packed by itself, so an example stands twice
in a row only where a part is so large, or the data so few, that a pass of some rows needs it twice. The parts are
`shares.py`, what is read at all is `selection.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.mixture import Unit
from megatron_xmtf.config.schema import BatchConfig, DatasetConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.fitting import FittingExamples, LeftOut
from megatron_xmtf.data.objectives import ObjectiveDataset
from megatron_xmtf.data.rounds import Rounds
from megatron_xmtf.data.shares import Floor, ShareNode, pass_quotas, share_counts, wanted_shares
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError

__all__ = ["Component", "Mixture", "MixtureDraws", "open_datasets"]

ROWS_OF_A_PASS = 128
"""Rows that a pass should fill at least: each leaves about half a row empty, 0.4 % of 128."""
ROUND_STREAM = 1
"""Keeps the random numbers of rounds apart from those of packing, which start from the same seed."""


def open_datasets(
    entries: Sequence[DatasetConfig],
    *,
    batch: BatchConfig | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> list[ExampleDataset]:
    """Open datasets in their order, each under its own name, documents as their objective sees them.

    Args:    entries: `data.training_datasets` or `data.validation_datasets`. tokenizer, vocab_size: checked against
             each dataset if given. batch, tokenizer: needed where an entry has an objective: `chunk_length` follows
             from the rows, special tokens from the vocabulary.
    Raises:  ConfigError: two datasets of one name. DatasetError, TokenizerError: as `ExampleDataset.open` and
             `ObjectiveDataset`.
    """
    datasets: list[ExampleDataset] = []
    for entry in entries:
        dataset = ExampleDataset.open(entry.prefix, name=entry.name, tokenizer=tokenizer, vocab_size=vocab_size)
        if entry.objective is not None:
            assert batch is not None and tokenizer is not None, "an objective needs the rows and the vocabulary"
            dataset = ObjectiveDataset(dataset, entry.objective, tokenizer=tokenizer, lengths=batch.row_lengths)
        datasets.append(dataset)
    for name, count in Counter(dataset.name for dataset in datasets).items():
        if count > 1:
            prefixes = [str(dataset.prefix) for dataset in datasets if dataset.name == name]
            raise ConfigError(
                f"{count} datasets are named {name!r} ({', '.join(prefixes[:3])}); reports tell them apart by name. "
                "Give each its own `name`."
            )
    return datasets


@dataclass(frozen=True)
class Component:
    """Examples of one dataset that have a part of the mixture together."""

    name: str
    """Path in the mixture, as "qa/squad" or "topics[sw]"."""
    dataset: int
    """Position of the dataset."""
    examples: FittingExamples
    unit_size: float
    """Mean size of an example in the mixture's unit: 1, its tokens, or its target tokens."""
    max_epochs: float | None = None
    fixed: bool = False
    """Drawn whole in every pass, beside the shares: the examples of a pinch."""

    @property
    def allowance(self) -> float:
        """Draws over the whole run; infinite without `max_epochs`."""
        if not len(self.examples):
            return 0.0
        return np.inf if self.max_epochs is None else float(int(self.max_epochs * len(self.examples)))


@dataclass(frozen=True)
class Mixture:
    """Components with their shares; built by `build_mixture`."""

    components: list[Component]
    """Those with shares in the order of the tree's leaves, then the fixed ones."""
    root: ShareNode
    floors: list[Floor]
    unit: Unit
    left_out: list[LeftOut]
    """Of each dataset: selected examples that are in no row."""

    @property
    def shared(self) -> list[Component]:
        """The components that have a share."""
        return [component for component in self.components if not component.fixed]

    def available(self, num_datasets: int) -> list[int]:
        """Return the number of examples of each dataset that can be drawn."""
        counts = [0] * num_datasets
        for component in self.components:
            counts[component.dataset] += len(component.examples)
        return counts

    def wanted_shares(self) -> list[float]:
        """Return the part that each component should have of what a pass draws, in the mixture's unit."""
        fixed = sum(len(one.examples) * one.unit_size for one in self.components if one.fixed)
        whole = self.root.counted_size() + fixed
        shares = (wanted_shares(self.root, self.floors) * (1 - fixed / whole)).tolist()
        return shares + [len(one.examples) * one.unit_size / whole for one in self.components if one.fixed]

    def raised_by_floors(self) -> list[bool]:
        """Tell which components have more than their rate, because of a floor."""
        with_floors, without = wanted_shares(self.root, self.floors), wanted_shares(self.root)
        return (with_floors > without * (1 + 1e-6)).tolist() + [False] * (len(self.components) - len(with_floors))


class MixtureDraws:
    """Draws pass after pass.

    Args:    capacity: tokens of a row: a pass should fill some rows. seed: decides the order in which each component's
             examples are drawn.
    """

    def __init__(self, mixture: Mixture, *, capacity: int, seed: int) -> None:
        self.mixture = mixture
        self._rounds = [
            Rounds(max(1, len(component.examples)), seed=(seed, ROUND_STREAM, number))
            for number, component in enumerate(mixture.components)
        ]
        shared = mixture.shared
        tokens = sum(int(one.examples.lengths.sum(dtype=np.int64)) for one in shared)
        size = sum(len(one.examples) * one.unit_size for one in shared)
        self._shortest = ROWS_OF_A_PASS * capacity * size / tokens

    @property
    def drawn(self) -> list[int]:
        """Draws of each component so far."""
        return [rounds.drawn for rounds in self._rounds]

    def next_pass(self) -> list[NDArray[np.int64]] | None:
        """Return the positions drawn of each component's examples, int64; None when `max_epochs` allows no more."""
        counts = self._next_counts()
        if counts is None:
            return None
        return [rounds.draw(count) for rounds, count in zip(self._rounds, counts, strict=True)]

    def _next_counts(self) -> list[int] | None:
        shared = self.mixture.shared
        sizes = np.array([component.unit_size for component in shared])
        allowances = np.array([component.allowance for component in shared])
        left = allowances - self.drawn[: len(shared)]
        quotas = pass_quotas(self.mixture.root, left * sizes, self.mixture.floors, shortest=self._shortest)
        examples = quotas / sizes
        total = round(float(examples.sum()))
        if total == 0:
            return None
        counts = [
            int(min(count, most))
            for count, most in zip(share_counts(total, examples.tolist()), left.tolist(), strict=True)
        ]
        return counts + [len(component.examples) for component in self.mixture.components if component.fixed]
