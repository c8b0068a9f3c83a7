"""How fast documents become examples of an objective: lengths before packing, tokens while training reads.

    python benchmarks/objectives.py --output benchmarks/results/objectives.json

    lengths      documents a second, from the lengths of documents alone, cut into chunks; what packing waits for
    tokens       tokens of documents a second that one process makes into inputs and targets, one chunk at a time as
                 rows are read, beside `plain`, which only copies the two halves of a stored pair of the same length
    fill         part of the rows' places that hold tokens, packed, for two rules of cutting long documents: `full`
                 (full chunks and a rest, ours) and `even` (parts of even length)

Lengths are lognormal (sigma 1, mean 660), as of documents of web text. The rates depend on the machine, the fill does
not. Takes about two minutes and 3 GiB with the sizes by default.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.best_fit import pack_lengths
from megatron_xmtf.data.objectives.alexatm_denoising import AlexaTMDenoising
from megatron_xmtf.data.objectives.chunks import Chunks
from megatron_xmtf.data.objectives.counter_random import chunk_key, chunk_keys, key_of, occurrence_key
from megatron_xmtf.data.objectives.document_split import DocumentSplit
from megatron_xmtf.data.objectives.rule import ObjectiveRule
from megatron_xmtf.data.objectives.span_corruption import SpanCorruption
from megatron_xmtf.files import write_json

EOS, CLM = 1, 3
RULES: dict[str, tuple[ObjectiveRule, int]] = {
    "alexatm_denoising": (AlexaTMDenoising(0.15, 3.0, (), EOS), 1023),
    "span_corruption": (SpanCorruption(0.15, 3.0, tuple(range(32099, 31999, -1)), (), EOS), 568),
    "causal": (DocumentSplit(0.2, 0.8, (CLM,), EOS), 1023),
    "prefix_lm": (DocumentSplit(0.0, 1.0, (), EOS), 1023),
}
"""Each with the longest chunk that rows of 1,024 and 1,024 tokens hold; for span_corruption T5's 568 of 512."""
BLOCK = 1 << 20


def draw_documents(count: int, *, seed: int) -> NDArray[np.int32]:
    """Draw lengths of documents."""
    return (np.random.default_rng(seed).lognormal(6.0, 1.0, count) + 2).astype(np.int32)


def measure_lengths(rule: ObjectiveRule, documents: NDArray[np.int32], *, chunk_length: int) -> float:
    """Return documents a second, cutting included."""
    begin = time.perf_counter()
    chunks, key = Chunks(documents, chunk_length=chunk_length), key_of("benchmark")
    for first in range(0, len(chunks), BLOCK):
        last = min(first + BLOCK, len(chunks))
        tokens, is_end = chunks.lengths(first, last)
        rule.lengths(tokens, is_end=is_end, keys=chunk_keys(np.arange(first, last, dtype=np.uint64), key=key))
    return len(documents) / (time.perf_counter() - begin)


def measure_tokens(rule: ObjectiveRule, lengths: list[int], stored: NDArray[np.uint16]) -> float:
    """Return tokens of documents a second, over chunks of these lengths."""
    key, begin = key_of("benchmark"), time.perf_counter()
    for number, length in enumerate(lengths):
        own = chunk_key(number, key=key)
        tokens = stored[:length].astype(np.int32)
        rule.example(tokens, is_end=True, chunk_key=own, noise_key=occurrence_key(own, number))
    return sum(lengths) / (time.perf_counter() - begin)


def measure_plain(lengths: list[int], stored: NDArray[np.uint16]) -> float:
    """Return the same for reading pairs as they are stored."""
    begin = time.perf_counter()
    for length in lengths:
        stored[: length // 2].astype(np.int32), stored[length // 2 : length].astype(np.int32)
    return sum(lengths) / (time.perf_counter() - begin)


def measure_fill(documents: NDArray[np.int32], *, chunk_length: int, capacity: int) -> dict[str, float]:
    """Return the fill of packed rows under both rules of cutting; a chunk of n tokens takes 0.85 n + n + 2 in a row."""
    chunks = Chunks(documents, chunk_length=chunk_length)
    full, _ = chunks.lengths(0, len(chunks))
    parts = np.maximum(-(-documents.astype(np.int64) // chunk_length), 1)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    even = np.repeat(documents // parts, parts) + (number < np.repeat(documents % parts, parts))
    rule, _ = RULES["alexatm_denoising"]
    found = {}
    for name, tokens in (("full", full), ("even", even)):
        together = rule.most(tokens)[2]
        offsets, _ = pack_lengths(together, capacity=capacity, seed=0)
        found[name] = float(together.sum() / ((len(offsets) - 1) * capacity))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--examples", type=int, default=4000, help="chunks made into tokens, in each of three rounds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    documents = draw_documents(arguments.documents, seed=1)
    stored = np.random.default_rng(2).integers(100, 32000, 2048).astype(np.uint16)
    rates: dict[str, dict[str, float]] = {}
    for name, (rule, chunk_length) in RULES.items():
        chunks = Chunks(documents[: arguments.examples], chunk_length=chunk_length)
        lengths = [int(length) for length in chunks.lengths(0, len(chunks))[0] if length >= 2]
        # Interleaved with the plain reading, the best of three: other work on the machine slows both.
        pairs = [(measure_tokens(rule, lengths, stored), measure_plain(lengths, stored)) for _ in range(3)]
        rates[name] = {
            "chunk_length": chunk_length,
            "documents_per_second": measure_lengths(rule, documents, chunk_length=chunk_length),
            "tokens_per_second": max(own for own, _ in pairs),
            "plain_tokens_per_second": max(plain for _, plain in pairs),
        }
        millions = {key: value / 1e6 for key, value in rates[name].items()}
        print(
            f"{name:<18} lengths {millions['documents_per_second']:5.1f} M documents/s   tokens "
            f"{millions['tokens_per_second']:5.1f} M/s (plain {millions['plain_tokens_per_second']:.0f})"
        )
    fill = measure_fill(documents[:1_000_000], chunk_length=553, capacity=1025)
    print(
        f"rows of 1,025 tokens, denoising in chunks of 553: full {100 * fill['full']:.2f} %, "
        f"even {100 * fill['even']:.2f} %"
    )
    if arguments.output is not None:
        facts = {"documents": arguments.documents, "rates": rates, "fill_fraction": fill}
        machine = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__}
        report: dict[str, Any] = {"date": date.today().isoformat(), "command": " ".join(sys.argv), **machine, **facts}
        write_json(arguments.output, json.loads(json.dumps(report)))


if __name__ == "__main__":
    main()
