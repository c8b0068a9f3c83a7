"""Small indexed datasets made of records, with the tokenizer of tests/data/conftest.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_directory)


@pytest.fixture
def make_dataset(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., ExampleDataset]:
    """Return a function that tokenises records (dictionaries) into a dataset of that name."""

    def make(name: str, records: list[dict], *, kind: str = "pairs") -> ExampleDataset:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        prefix = tmp_path / "datasets" / name
        preprocess([source], tokenizer=tokenizer, output_prefix=prefix, kind=kind, show_progress=False)
        dataset = ExampleDataset.open(prefix)
        assert len(dataset) == len(records), "records were dropped, the tests number them"
        return dataset

    return make
