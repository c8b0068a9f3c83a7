"""Training an mT5 beside transformers' Seq2SeqTrainer: target tokens a second and memory, on a CPU, in fp32.

    python benchmarks/encoder_decoder.py --data DIR --work DIR --peer-python PYTHON \\
        --output benchmarks/results/encoder_decoder.json

An mT5 as wide as mT5-small with 4 + 4 layers, one process with two threads each, the same real prompted records:
    ours          the path of `xmtf train`: rows packed on both sides, every segment isolated, the head on targets alone
    transformers  Seq2SeqTrainer, micro-batches of 8, each side padded to its longest, in the order of the records
    grouped       the same, grouped by the length of the inputs
Rounds, rates and the step that is not counted are those of benchmarks/training.py; so are DIR and its records. Inputs
that do not fit the encoder, and targets that do not fit the decoder, are left out for all sides. transformers attends
as --peer-attention says; its fused attention has no gradient of T5's bias, and it takes torch's plain one.

    agreement     one step of ours and of transformers over the same 8 records: loss and gradient norm
    small, large  speed with 32,000 words, and with the 250,112 of mT5

The losses of transformers' steps are not comparable: its mT5 takes the trainer's `num_items_in_batch` without using
it, so that losses and gradients of accumulated micro-batches are summed, not averaged. Its time is the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

from training import HYPERPARAMETERS, MICRO_BATCH_SIZE, THREADS, compare_sides, peer_versions, print_table, run_side
from training_inputs import MT5_SIZES, TOKENIZER_WORDS, write_dataset, write_model

from megatron_xmtf.files import write_json

SIDES = ("ours", "transformers", "grouped")
PEERS = "encoder_decoder_peers.py"
MT5_WORDS = 250_112
STEPS = 4


def make_job(
    arguments: argparse.Namespace, *, words: int, count: int, encoder_length: int, decoder_length: int, steps: int
) -> dict[str, Any]:
    """Write dataset and model, and say what each side is to do with them."""
    prefix, examples, about = write_dataset(
        arguments.work, arguments.data, count=count, longest=(encoder_length, decoder_length)
    )
    inputs, targets = about["tokens"] - about["target_tokens"] + count, about["target_tokens"]
    # No packing needs fewer: what ours reads is at most one pass.
    rows = max(-(-inputs // encoder_length), -(-targets // decoder_length))
    padded = count // MICRO_BATCH_SIZE
    if rows < steps or padded < steps:
        raise SystemExit(f"{count} records are {rows} rows and {padded} micro-batches: too few for {steps} steps")
    return {
        "model": str(write_model(arguments.work, words=words, family="mt5")),
        "prefix": str(prefix),
        "examples": str(examples),
        "records": about,
        "threads": THREADS,
        "steps": steps,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "accumulation": {"ours": rows // steps, "transformers": padded // steps, "grouped": padded // steps},
        "row_lengths": {"encoder_length": encoder_length, "decoder_length": decoder_length},
        "attention": arguments.attention,
        "peer_attention": arguments.peer_attention,
        **HYPERPARAMETERS,
    }


def measure_speed(arguments: argparse.Namespace, *, words: int, count: int, rounds: int) -> dict[str, Any]:
    """Run all sides in turn with one vocabulary."""
    lengths = {"encoder_length": arguments.encoder_length, "decoder_length": arguments.decoder_length}
    job = make_job(arguments, words=words, count=count, **lengths, steps=STEPS)
    sides, ratios = compare_sides(arguments, job, rounds=rounds, peers=PEERS)
    found = {"words": words, **lengths, "records": job["records"], "sides": sides, "ours_over": ratios}
    print_table(found)
    return found


def measure_agreement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let ours and transformers do one step over the same 8 records: one full row, one padded micro-batch."""
    lengths = {"encoder_length": 512, "decoder_length": 128}
    job = make_job(arguments, words=TOKENIZER_WORDS, count=MICRO_BATCH_SIZE, **lengths, steps=1)
    targets = job["records"]["target_tokens"]
    inputs = job["records"]["tokens"] - targets + MICRO_BATCH_SIZE
    job["row_lengths"] = {"encoder_length": inputs, "decoder_length": targets}
    job["accumulation"] = {"ours": 1, "transformers": 1}
    ours, theirs = (run_side(side, job, arguments, peers=PEERS) for side in ("ours", "transformers"))
    assert ours["examples"] == MICRO_BATCH_SIZE, "the row holds each record once"
    assert ours["micro_batches"][0]["tokens"] == theirs["micro_batches"][0]["tokens"] == inputs + targets
    found = {
        "target_tokens": targets,
        **{name: {"ours": ours[name][0], "transformers": theirs[name][0]} for name in ("losses", "grad_norms")},
    }
    for name in ("losses", "grad_norms"):
        assert abs(ours[name][0] / theirs[name][0] - 1) < 1e-5, f"{name} differ: {found}"
    print(f"same 8 records, {targets} target tokens: {found['losses']}, gradient {found['grad_norms']}", flush=True)
    return found


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the real data")
    parser.add_argument("--work", type=Path, required=True, help="for records, datasets and models; kept")
    parser.add_argument("--peer-python", required=True, help="a Python that has torch, transformers and accelerate")
    parser.add_argument("--parts", nargs="+", default=["agreement", "small", "large"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=2, help="with 32,000 words")
    parser.add_argument("--large-rounds", type=int, default=1, help="with 250,112")
    parser.add_argument("--records", type=int, default=128, help="with 32,000 words; a multiple of 32")
    parser.add_argument("--large-records", type=int, default=64, help="with 250,112 words; a multiple of 32")
    parser.add_argument("--encoder-length", type=int, default=1024)
    parser.add_argument("--decoder-length", type=int, default=256)
    parser.add_argument("--attention", default="auto", help="kernels.attention of ours")
    parser.add_argument("--peer-attention", default="sdpa", choices=["sdpa", "eager"], help="of transformers")
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core CPU", help="as it is to stand in the results")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.trl_python = arguments.peer_python
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    small = {"words": TOKENIZER_WORDS, "count": arguments.records, "rounds": arguments.rounds}
    large = {"words": MT5_WORDS, "count": arguments.large_records, "rounds": arguments.large_rounds}
    parts = {
        "agreement": lambda: measure_agreement(arguments),
        "small": lambda: measure_speed(arguments, **small),
        "large": lambda: measure_speed(arguments, **large),
    }
    results = {part: parts[part]() for part in arguments.parts}
    if arguments.output:
        own = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
        content = {
            "benchmark": "encoder_decoder",
            "date": date.today().isoformat(),
            "machine": arguments.machine,
            "versions": {"python": platform.python_version(), **own, "peers": peer_versions(arguments.peer_python)},
            "model": {**MT5_SIZES, "precision": "fp32", "threads": THREADS},
            "peer_attention": arguments.peer_attention,
            "results": results,
        }
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
