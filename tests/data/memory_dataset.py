"""An ExampleDataset held in memory, for tests of what is built on it."""

from pathlib import Path

import numpy as np


class MemoryDataset:
    """Examples of given lengths; token values tell dataset, example and place apart.

    Columns are lists of names, one an example; documents are numbers.
    """

    inputs_end_with_eos = False

    def __init__(self, name, examples, manifest=None, columns=None, documents=None):
        self.columns = columns or {}
        self.documents = None if documents is None else np.asarray(documents, np.uint64)
        self.name, self.prefix, self.manifest = name, Path(name), manifest
        self.examples = [(np.asarray(i, np.int32), np.asarray(t, np.int32)) for i, t in examples]
        self.kind = "text" if examples and not any(len(i) for i, _ in examples) else "pairs"
        self.input_lengths = np.array([len(i) for i, _ in self.examples], np.int32)
        self.target_lengths = np.array([len(t) for _, t in self.examples], np.int32)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, number):
        return self.examples[number]

    def example(self, number, *, occurrence):
        return self[number]

    def occurrence_lengths(self, examples, occurrences):
        return self.input_lengths[examples].astype(np.int64), self.target_lengths[examples].astype(np.int64)

    @property
    def places(self):
        return np.arange(len(self), dtype=np.uint64)

    @property
    def column_names(self):
        return list(self.columns)

    def names(self, column):
        return sorted(set(self.columns.get(column, [])))

    def column(self, column):
        if column not in self.columns:
            return None
        names = self.names(column)
        return np.array([names.index(name) for name in self.columns[column]], np.uint8)


def dataset_of_lengths(name, lengths, first_token=10):
    """Build a dataset of (input length, target length) pairs with tokens that never repeat."""
    examples, token = [], first_token
    for inputs, targets in lengths:
        values = np.arange(token, token + inputs + targets)
        examples.append((values[:inputs], values[inputs:]))
        token += inputs + targets
    return MemoryDataset(name, examples)


def random_dataset(name, count, *, seed, longest=12, first_token=10):
    """Build a dataset of random short pairs."""
    lengths = np.random.default_rng(seed).integers(1, longest, size=(count, 2)).tolist()
    return dataset_of_lengths(name, lengths, first_token)
