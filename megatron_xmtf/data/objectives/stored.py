"""The stored documents behind datasets read under objectives: what guards look at, once for all objectives.

datasets            wiki:alexatm_denoising   wiki:causal   qa
stored              wiki                     (the same)    qa        scanned: documents and examples as they are
flags of stored     document 3 is a duplicate
flags of datasets   chunks of document 3     of document 3
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.objectives.dataset import ObjectiveDataset

__all__ = ["StoredDatasets"]


class StoredDatasets:
    """What is behind some datasets, each prefix once, in the order of first appearance."""

    def __init__(self, datasets: Sequence[ExampleDataset]) -> None:
        self.read = list(datasets)
        behind = [dataset.source if isinstance(dataset, ObjectiveDataset) else dataset for dataset in datasets]
        number_of = {prefix: number for number, prefix in enumerate(dict.fromkeys(one.prefix for one in behind))}
        self.owners = [number_of[one.prefix] for one in behind]
        """[datasets], the stored dataset of each."""
        self.stored = [behind[self.owners.index(number)] for number in range(len(number_of))]

    def selected(self, selected: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
        """Tell for each stored dataset which of its documents some dataset selects.

        Args:    selected: for each dataset bool [examples].
        """
        found = [np.zeros(len(one), np.bool_) for one in self.stored]
        for dataset, owner, chosen in zip(self.read, self.owners, selected, strict=True):
            if isinstance(dataset, ObjectiveDataset):
                found[owner][dataset.chunks.documents[chosen]] = True
            else:
                found[owner] |= chosen
        return found

    def spread(self, flags: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Give every example the flags of its document.

        Args:    flags: for each stored dataset uint8 [documents].
        """
        return [
            flags[owner][dataset.chunks.documents] if isinstance(dataset, ObjectiveDataset) else flags[owner]
            for dataset, owner in zip(self.read, self.owners, strict=True)
        ]
