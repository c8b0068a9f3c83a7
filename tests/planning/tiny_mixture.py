"""Small preprocessed datasets of two tasks in three languages, and the configuration of a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_xmtf.config import RunConfig, config_from_mapping
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from tests.tiny import write_tiny_tokenizer


def words(generator: np.random.Generator, longest: int) -> str:
    return "".join(chr(97 + int(letter)) for letter in generator.integers(0, 26, generator.integers(1, longest)))


def write_dataset(
    prefix: Path, records: list[dict[str, Any]], tokenizer: Path, *, kind: Literal["pairs", "text"] = "pairs"
) -> str:
    """Preprocess records; a byte is a token, a target has a space before it and an end-of-sequence token."""
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    preprocess([source], tokenizer=Tokenizer.load(tokenizer), output_prefix=prefix, workers=1, kind=kind)
    return str(prefix)


def write_mixture(directory: Path, *, seed: int = 0) -> list[str]:
    """Write two datasets: "qa", of three languages and two templates, and "topics", one of them without a language.

    Inputs of up to 40 tokens and targets of up to 20: some are too long for rows of 33.
    """
    generator = np.random.default_rng(seed)
    tokenizer = directory / "tokenizer"
    write_tiny_tokenizer(tokenizer)
    qa = [
        {
            "inputs": words(generator, 40),
            "targets": words(generator, 20),
            "language": ["sw", "sw", "sw", "yo", "th"][number % 5],
            "dataset": ["squad", "tydi"][number % 2],
            "template": ["ask", "tell"][number % 3 % 2],
            "id": str(number),
        }
        for number in range(60)
    ]
    topics = [
        {"inputs": words(generator, 12), "targets": words(generator, 6), **({"language": "sw"} if number % 2 else {})}
        for number in range(25)
    ]
    return [write_dataset(directory / "qa", qa, tokenizer), write_dataset(directory / "topics", topics, tokenizer)]


def run_config(directory: Path, prefixes: list[str], **sections: Any) -> RunConfig:
    """Return a run on those datasets, weights 3 and 1; keywords replace whole sections."""
    values: dict[str, Any] = {
        "model": str(directory / "model"),
        "output": str(directory / "run"),
        "data": {"train": [{"prefix": prefix, "weight": w} for prefix, w in zip(prefixes, (3, 1), strict=False)]},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 32},
        "schedule": {"train_steps": 15, "lr_warmup_steps": 2},
        **sections,
    }
    return config_from_mapping(values, RunConfig, source="test")
