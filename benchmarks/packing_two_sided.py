"""Fill and time of packing into rows of two sides, beside the rules of other trainers, on real prompted records.

    python benchmarks/packing_two_sided.py --data DIR --work DIR --output benchmarks/results/packing_two_sided.json

    ours                  the pair of lengths nearest to the room left, on counts of pairs; then a random example for
                          each place (`data/two_sided_fit.py`)
    next_fit              T5X and seqio (`trim_and_pack_dataset`), derived again from its rule: in a random order, a row
                          is closed when the next example does not fit one of its sides
    best_fit_decreasing   longest first (both sides added, in parts of each) into the row that it leaves least of: the
                          textbook's carry-over of one-sided best fit, example classes by classes
    padded                one example a row, as `transformers` trains without packing

Records are rendered from the real data with several templates a row (`rendered_records.py`) and tokenised by each
tokenizer; EOS ends both sides. Examples that are too long for a side are left out. The numbers of millions of examples
are these records drawn again and again, each length changed by up to a fifth, so that there are as many different pairs
as in real data of that size. Seconds are processor seconds of a process of its own (wall time says nothing on a busy
machine), memory is the growth of its peak. fewest_rows: a bound below which no packing can go; ratio: peer / ours in
rows. Takes about 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rendered_records import write_records

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.data.two_sided_fit import fewest_rows, pack_two_sided

ENCODER_LENGTH, DECODER_LENGTH = 1024, 256
MEGABYTES = 60
RECORDS = 60_000
CHANGE = 0.2
PEER_LIMIT = 100_000
"""Largest number of examples that the peers, which take a Python step an example or more, are given."""


def read_lengths(data: Path, work: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenise rendered records, once; return their lengths with EOS on both sides, int [examples, 2]."""
    kept = work / f"lengths-{tokenizer.directory.name}-{RECORDS}.npy"
    if kept.is_file():
        return np.load(kept)
    records, _ = write_records(work, data=data, megabytes=MEGABYTES)["shuffled"]
    with records.open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for _, line in zip(range(RECORDS), lines, strict=False)]
    sides = [
        [len(ids) + 1 for ids in tokenizer.encode_batch([prefix + pair[side] for pair in pairs])]
        for side, prefix in (("inputs", ""), ("targets", " "))
    ]
    np.save(kept, np.array(sides).T)
    return np.array(sides).T


def fitting(lengths: np.ndarray) -> np.ndarray:
    """Keep what fits both sides."""
    return lengths[(lengths <= (ENCODER_LENGTH, DECODER_LENGTH)).all(axis=1)]


def draw_more(lengths: np.ndarray, count: int) -> np.ndarray:
    """Draw examples again, each length times a number between 0.8 and 1.2, uint16 [count, 2]."""
    random = np.random.default_rng(0)
    drawn = np.empty((count, 2), np.uint16)
    for begin in range(0, count, 1 << 20):
        block = lengths[random.integers(0, len(lengths), min(1 << 20, count - begin))]
        changed = np.rint(block * random.uniform(1 - CHANGE, 1 + CHANGE, block.shape))
        drawn[begin : begin + len(block)] = np.clip(changed, 2, (ENCODER_LENGTH, DECODER_LENGTH))
    return drawn


def pack_ours(lengths: np.ndarray) -> int:
    """Rows and the assignment of examples to them, shuffled."""
    offsets, _ = pack_two_sided(
        lengths[:, 0], lengths[:, 1], encoder_length=ENCODER_LENGTH, decoder_length=DECODER_LENGTH, seed=0
    )
    return len(offsets) - 1


def pack_next_fit(lengths: np.ndarray) -> int:
    """Close a row when the next example does not fit."""
    rows, inputs_used, targets_used = 1, 0, 0
    for inputs, targets in np.random.default_rng(0).permutation(lengths).tolist():
        if inputs_used + inputs > ENCODER_LENGTH or targets_used + targets > DECODER_LENGTH:
            rows, inputs_used, targets_used = rows + 1, 0, 0
        inputs_used, targets_used = inputs_used + inputs, targets_used + targets
    return rows


def pack_best_fit_decreasing(lengths: np.ndarray) -> int:
    """Put the longest first, each into the row with room that it leaves least of; equal rows are counted together."""
    sizes = np.array([ENCODER_LENGTH, DECODER_LENGTH])
    classes, counts = np.unique(lengths.astype(np.int64), axis=0, return_counts=True)
    rooms, free, place, rows = np.zeros((len(classes) * 4, 2), np.int64), np.zeros(len(classes) * 4, np.int64), {}, 0
    for number in np.argsort(-(classes / sizes).sum(axis=1), kind="stable").tolist():
        pair, left = classes[number], int(counts[number])
        while left:
            possible = np.flatnonzero((rooms[: len(place)] >= pair).all(axis=1) & (free[: len(place)] > 0))
            if len(possible):
                at = int(possible[((rooms[possible] - pair) / sizes).sum(axis=1).argmin()])
                after, taken = rooms[at] - pair, min(left, int(free[at]))
                free[at] -= taken
            else:
                after, taken, rows = sizes - pair, 1, rows + 1
            at = place.setdefault(tuple(after.tolist()), len(place))
            rooms[at] = after
            free[at] += taken
            left -= taken
    return rows


def pack_padded(lengths: np.ndarray) -> int:
    """One example a row."""
    return len(lengths)


METHODS: dict[str, Callable[[np.ndarray], int]] = {
    "ours": pack_ours,
    "next_fit": pack_next_fit,
    "best_fit_decreasing": pack_best_fit_decreasing,
    "padded": pack_padded,
}


def measure(method: str, lengths: np.ndarray) -> dict[str, Any]:
    """Pack in a process of its own."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        rows = METHODS[method](lengths)
        seconds = time.process_time() - start
        send.send((rows, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    rows, seconds, gib = receive.recv()
    process.join()
    tokens = lengths.sum(axis=0, dtype=np.int64)
    return {
        "method": method,
        "rows": rows,
        "encoder_fill_percent": round(100 * int(tokens[0]) / (rows * ENCODER_LENGTH), 2),
        "decoder_fill_percent": round(100 * int(tokens[1]) / (rows * DECODER_LENGTH), 2),
        "processor_seconds": round(seconds, 2),
        "peak_memory_gib": round(gib, 2),
    }


def compare(lengths: np.ndarray, about: dict[str, Any]) -> dict[str, Any]:
    """Measure every method on the same lengths."""
    counts = np.zeros((ENCODER_LENGTH + 1, DECODER_LENGTH + 1), np.int64)
    np.add.at(counts, (lengths[:, 0], lengths[:, 1]), 1)
    found = [measure(method, lengths) for method in METHODS if method == "ours" or len(lengths) <= PEER_LIMIT]
    for one in found:
        one["ratio"] = round(one["rows"] / found[0]["rows"], 3)
    bound = fewest_rows(counts)
    tokens = lengths.sum(axis=0, dtype=np.int64)
    result = {
        **about,
        "examples": len(lengths),
        "different_pairs": int(np.count_nonzero(counts)),
        "mean_lengths": [round(float(mean), 1) for mean in lengths.mean(axis=0)],
        "fewest_rows": bound,
        "most_encoder_fill_percent": round(100 * int(tokens[0]) / (bound * ENCODER_LENGTH), 2),
        "most_decoder_fill_percent": round(100 * int(tokens[1]) / (bound * DECODER_LENGTH), 2),
        "methods": found,
    }
    print(json.dumps(result, indent=1), flush=True)
    return result


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="+", default=["whisper-large-v3", "t5-small"])
    parser.add_argument("--examples", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results, multilingual = [], None
    for name in arguments.tokenizers:
        tokenizer = Tokenizer.load(arguments.data / "tokenizers" / name)
        everything = read_lengths(arguments.data, arguments.work, tokenizer)
        lengths = fitting(everything)
        multilingual = lengths if multilingual is None else multilingual
        results.append(compare(lengths, {"tokenizer": name, "too_long": len(everything) - len(lengths)}))
    for count in arguments.examples:
        results.append(compare(draw_more(multilingual, count), {"tokenizer": arguments.tokenizers[0], "drawn": True}))
    if arguments.output:
        about = {
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "date": date.today().isoformat(),
            "encoder_length": ENCODER_LENGTH,
            "decoder_length": DECODER_LENGTH,
        }
        arguments.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
