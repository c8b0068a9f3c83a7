"""Which examples of which dataset an epoch holds.

    examples held   weights   an epoch of 10 holds        drawn from
    A: 6            none      all 6                       every example once an epoch
    B: 4            none      all 4
    A: 6            1         10 * 1/4 = 2.5 -> 3         half of A an epoch, and nothing twice in two epochs
    B: 4            3         10 * 3/4 = 7.5 -> 7         B once and 3 of it again: 3 repeats

Shares are rounded by largest remainder, so that an epoch has exactly as many examples as the datasets hold together.
Each dataset is read in passes, every pass a new random order, and each epoch goes on where the one before it stopped:
over the whole run no example is drawn twice more often than another of its dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.schema import DatasetConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError

__all__ = ["epoch_examples", "open_datasets", "share_counts"]

PASS_STREAM = 1
"""Keeps the random numbers of passes apart from those of packing, which start from the same seed."""


def open_datasets(
    entries: Sequence[DatasetConfig], *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> list[ExampleDataset]:
    """Open the datasets of a mixture, in its order, each under its own name.

    Args:    entries: `data.train` or `data.validation`. tokenizer, vocab_size: checked against each dataset if given.
    Raises:  ConfigError: two datasets of one name. DatasetError, TokenizerError: as `ExampleDataset.open`.
    """
    datasets = [
        ExampleDataset.open(entry.prefix, name=entry.name, tokenizer=tokenizer, vocab_size=vocab_size)
        for entry in entries
    ]
    for name, count in Counter(dataset.name for dataset in datasets).items():
        if count > 1:
            prefixes = [str(dataset.prefix) for dataset in datasets if dataset.name == name]
            raise ConfigError(
                f"{count} datasets are named {name!r} ({', '.join(prefixes[:3])}); reports tell them apart by name. "
                "Give each its own `name`."
            )
    return datasets


def share_counts(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` examples in proportion to `weights`, exactly, by largest remainder.

    >>> share_counts(10, [1, 3])
    [3, 7]
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def epoch_examples(
    sizes: Sequence[int], *, weights: Sequence[float] | None, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Choose the examples of one epoch.

    Args:    sizes: examples that each dataset holds. weights: relative number of examples drawn from each, > 0;
             None: every example once. seed, epoch: integers from 0.
             With weights every size is at least 1.
    Returns: for each dataset the positions drawn (int64, 0..size-1), ascending within a pass.
    """
    if weights is None:
        return [np.arange(size, dtype=np.int64) for size in sizes]
    assert all(sizes), f"a dataset with a weight needs an example to draw; the datasets hold {list(sizes)}"
    shares = share_counts(sum(sizes), weights)
    return [
        _window(size, first=epoch * share, count=share, seed=(seed, PASS_STREAM, number))
        for number, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]


def _window(size: int, *, first: int, count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Return draws first..first+count-1 of a dataset that is read pass after pass, each in a new random order."""
    parts = [np.zeros(0, np.int64)]
    end = first + count
    while first < end:
        number, begin = divmod(first, size)
        stop = min(size, begin + end - first)
        if stop - begin == size:
            parts.append(np.arange(size, dtype=np.int64))
        else:
            drawn = np.random.default_rng((*seed, number)).permutation(size)[begin:stop]
            parts.append(np.sort(drawn))
        first += stop - begin
    return np.concatenate(parts)
