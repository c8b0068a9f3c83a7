"""Training beside transformers' Trainer and TRL's SFTTrainer: target tokens a second and memory, on a CPU, in fp32.

    python benchmarks/training.py --data DIR --work DIR --trl-python PYTHON --output benchmarks/results/training.json

A BLOOM of hidden size 512 and 8 layers, one process with two threads each, the same real prompted records:
    ours          the path of `xmtf train`: packed rows, every segment isolated, the head on targets alone
    transformers  Trainer, micro-batches of 8 padded to their longest, in the order of the records
    grouped       the same, grouped by length
    trl           SFTTrainer, packing "bfd" and isolated segments (position ids), loss on completions; TRL supports no
                  BLOOM, so a GPT-2 of the same layers; where another order is not said it is that of the records
Packers lay records into rows in an order of their own. Sides are run in turn, `--rounds` times, each in a fresh
process; the first step of each run warms up and is not counted. A side's rate is its target tokens over all rounds by
the seconds, each step from the end of the one before: reading, forward, backward, update, logging.

    agreement     one step of ours and of transformers over the same records at once: loss and gradient norm
    loop          our `train_step` over a bare loop (forward, backward, fused AdamW) on the same micro-batches

PYTHON has torch, transformers, accelerate and trl; versions are in the results. DIR --data is the real data; --work is
kept, its records are rendered once (about four minutes).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from training_inputs import HIDDEN_SIZE, LAYERS, TOKENIZER_WORDS, write_dataset, write_model

from megatron_xmtf.files import write_json

SIDES = ("ours", "transformers", "grouped", "trl")
MICRO_BATCH_SIZE = 8
THREADS = 2
STEPS = 4
BLOOM_WORDS = 250_880
REPOSITORY = Path(__file__).parents[1]
HYPERPARAMETERS = {"learning_rate": 1e-4, "weight_decay": 0.01, "adam_beta2": 0.95}


def run_side(
    side: str, job: dict[str, Any], arguments: argparse.Namespace, *, peers: str = "training_peers.py"
) -> dict[str, Any]:
    """Run one side in a fresh process."""
    output = arguments.work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    job = {**job, "output": str(output / "run"), "result": str(output / "result.json")}
    (output / "job.json").write_text(json.dumps(job), encoding="utf-8")
    is_ours = side in ("ours", "loop")
    program = REPOSITORY / "benchmarks" / ("training_ours.py" if is_ours else peers)
    python = sys.executable if is_ours else arguments.trl_python
    environment = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, program, "--side", side, "--job", output / "job.json"],
        env={**os.environ, **environment, **({"PYTHONPATH": str(REPOSITORY)} if is_ours else {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    return found


def make_job(
    arguments: argparse.Namespace, *, words: int, count: int, longest: int, sequence_length: int, steps: int
) -> dict[str, Any]:
    """Write dataset and models, and say what each side is to do with them."""
    prefix, examples, about = write_dataset(arguments.work, arguments.data, count=count, longest=longest)
    rows = about["tokens"] // (sequence_length + 1)
    padded = count // MICRO_BATCH_SIZE
    if rows < steps or padded < steps:
        raise SystemExit(f"{count} records are {rows} rows and {padded} micro-batches: too few for {steps} steps")
    sides = {"ours": rows, "trl": rows, "transformers": padded, "grouped": padded}
    return {
        "model": str(write_model(arguments.work, words=words, family="bloom")),
        "gpt2": str(write_model(arguments.work, words=words, family="gpt2")),
        "prefix": str(prefix),
        "examples": str(examples),
        "records": about,
        "threads": THREADS,
        "steps": steps,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "accumulation": {side: total // steps for side, total in sides.items()},
        "row_lengths": {"sequence_length": sequence_length},
        "attention": arguments.attention,
        **HYPERPARAMETERS,
    }


def counted(run: dict[str, Any]) -> dict[str, float]:
    """Add up the steps after the first: seconds, and what their micro-batches held."""
    steps = len(run["ends"])
    each = len(run["micro_batches"]) // steps
    held = run["micro_batches"][each : each * steps]
    return {
        "seconds": run["ends"][-1] - run["ends"][0],
        "steps": steps - 1,
        **{name: sum(one[name] for one in held) for name in ("computed", "tokens", "target_tokens")},
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the rounds of one side."""
    rounds = [counted(run) for run in runs]
    seconds = sum(one["seconds"] for one in rounds)
    total = {name: sum(one[name] for one in rounds) for name in ("computed", "tokens", "target_tokens", "steps")}
    return {
        "target_tokens_per_second": round(total["target_tokens"] / seconds, 1),
        "tokens_per_second": round(total["tokens"] / seconds, 1),
        "filled_percent": round(100 * total["tokens"] / total["computed"], 1),
        "step_seconds": round(seconds / total["steps"], 2),
        "peak_mib": round(max(run["peak_mib"] for run in runs)),
        "parameters": runs[0]["parameters"],
        "rounds": [round(one["target_tokens"] / one["seconds"], 1) for one in rounds],
        "losses": [round(loss, 4) for loss in runs[0]["losses"]],
    }


def compare_sides(
    arguments: argparse.Namespace, job: dict[str, Any], *, rounds: int, peers: str = "training_peers.py"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all sides in turn; return what each did, and ours over each of the others."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for number in range(rounds):
        for side in arguments.sides:
            runs[side].append(run_side(side, job, arguments, peers=peers))
            latest = counted(runs[side][-1])
            rate = latest["target_tokens"] / latest["seconds"]
            print(f"  round {number + 1} {side:<13}{rate:9.1f} target tokens/s", flush=True)
    sides = {side: summarize(found) for side, found in runs.items()}
    ratios = {}
    for side in arguments.sides:
        if side != "ours" and "ours" in sides:
            pairs = zip(sides["ours"]["rounds"], sides[side]["rounds"], strict=True)
            ratios[side] = {
                "ratio": round(sides["ours"]["target_tokens_per_second"] / sides[side]["target_tokens_per_second"], 2),
                "rounds": [round(ours / theirs, 2) for ours, theirs in pairs],
                "memory_ratio": round(sides["ours"]["peak_mib"] / sides[side]["peak_mib"], 2),
            }
    return sides, ratios


def measure_speed(
    arguments: argparse.Namespace, *, words: int, count: int, longest: int, sequence_length: int, rounds: int
) -> dict[str, Any]:
    """Run all sides in turn with one vocabulary."""
    sizes = {"words": words, "longest": longest, "sequence_length": sequence_length}
    job = make_job(arguments, **sizes, count=count, steps=STEPS)
    sides, ratios = compare_sides(arguments, job, rounds=rounds)
    found = {**sizes, "records": job["records"], "sides": sides, "ours_over": ratios}
    print_table(found)
    return found


def print_table(found: dict[str, Any]) -> None:
    """Print one vocabulary's sides."""
    about = found["records"]
    print(
        f"\n{found['words']:,} words; {about['records']} records of {about['length_mean']} tokens on average, at most "
        f"{about['length_longest']}, {about['target_percent']} % of them targets"
    )
    print(f"{'':<14}{'target tok/s':>13}{'tok/s':>9}{'filled':>9}{'s/step':>9}{'peak MiB':>10}{'ours is':>9}")
    for side, row in found["sides"].items():
        ratio = found["ours_over"].get(side)
        times = "" if ratio is None else f"{ratio['ratio']:.2f} x"
        print(
            f"{side:<14}{row['target_tokens_per_second']:>13,.1f}{row['tokens_per_second']:>9,.1f}"
            f"{row['filled_percent']:>8.1f}%{row['step_seconds']:>9.2f}{row['peak_mib']:>10,}{times:>9}"
        )
    print(flush=True)


def measure_agreement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let ours and transformers do one step over the same 8 records: one full row, one padded micro-batch."""
    job = make_job(arguments, words=TOKENIZER_WORDS, count=MICRO_BATCH_SIZE, longest=512, sequence_length=8, steps=1)
    job["row_lengths"] = {"sequence_length": job["records"]["tokens"] - 1}
    job["accumulation"] = {"ours": 1, "transformers": 1}
    ours, theirs = (run_side(side, job, arguments) for side in ("ours", "transformers"))
    assert ours["examples"] == MICRO_BATCH_SIZE, "the row holds each record once"
    assert ours["micro_batches"][0]["target_tokens"] == theirs["micro_batches"][0]["target_tokens"]
    found = {
        "target_tokens": ours["micro_batches"][0]["target_tokens"],
        **{name: {"ours": ours[name][0], "transformers": theirs[name][0]} for name in ("losses", "grad_norms")},
    }
    for name in ("losses", "grad_norms"):
        assert abs(ours[name][0] / theirs[name][0] - 1) < 1e-5, f"{name} differ: {found}"
    print(f"same 8 records, {found['target_tokens']} target tokens: {found['losses']}, gradient {found['grad_norms']}")
    return found


def measure_loop(
    arguments: argparse.Namespace, *, words: int, count: int, longest: int, sequence_length: int
) -> dict[str, Any]:
    """Time our step beside the bare loop; at a second and more, the loop may cost 5 %."""
    sizes = {"words": words, "longest": longest, "sequence_length": sequence_length}
    job = make_job(arguments, **sizes, count=count, steps=arguments.loop_steps)
    found = run_side("loop", job, arguments)
    ours, bare = (found["seconds"][side][1:] for side in ("ours", "bare"))
    differences = [a / b - 1 for a, b in zip(*(found["losses"][side] for side in ("ours", "bare")), strict=True)]
    result = {
        "steps": len(ours),
        "ours_seconds": round(statistics.median(ours), 3),
        "bare_seconds": round(statistics.median(bare), 3),
        "overhead_percent": round(100 * (statistics.median(a / b for a, b in zip(ours, bare, strict=True)) - 1), 2),
        "largest_loss_difference": max(map(abs, differences)),
    }
    print(
        f"loop: {result['ours_seconds']} s a step, bare {result['bare_seconds']} s: {result['overhead_percent']} % "
        f"over {result['steps']} steps",
        flush=True,
    )
    return result


def peer_versions(python: str) -> dict[str, str]:
    """Ask the peers' Python for its versions; a peer that is not run need not be there."""
    program = (
        "import importlib.metadata as m, json; there = {d.metadata['Name'] for d in m.distributions()}; "
        "print(json.dumps({n: m.version(n) if n in there else 'not installed' for n in NAMES}))"
    )
    names = ("torch", "transformers", "accelerate", "trl")
    done = subprocess.run([python, "-c", f"NAMES={names!r}\n{program}"], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the real data")
    parser.add_argument("--work", type=Path, required=True, help="for records, datasets and models; kept")
    parser.add_argument("--trl-python", required=True, help="a Python that has torch, transformers, accelerate, trl")
    parser.add_argument("--parts", nargs="+", default=["agreement", "loop", "small", "large"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=2, help="with 32,000 words")
    parser.add_argument("--large-rounds", type=int, default=1, help="with 250,880")
    parser.add_argument("--records", type=int, default=128, help="with 32,000 words; a multiple of 32")
    parser.add_argument("--large-records", type=int, default=64, help="with 250,880 words; a multiple of 32")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a record, with 32,000 words")
    parser.add_argument(
        "--large-longest", type=int, default=256, help="with 250,880: the padded logits of 8 x 1024 are 8 GiB a copy"
    )
    parser.add_argument("--sequence-length", type=int, default=1024, help="of packed rows, with 32,000 words")
    parser.add_argument("--large-sequence-length", type=int, default=512, help="with 250,880")
    parser.add_argument("--loop-steps", type=int, default=6)
    parser.add_argument("--attention", default="auto", help="kernels.attention of ours")
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core CPU", help="as it is to stand in the results")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    small = {"words": TOKENIZER_WORDS, "count": arguments.records, "longest": arguments.longest}
    small["sequence_length"] = arguments.sequence_length
    large = {"words": BLOOM_WORDS, "count": arguments.large_records, "longest": arguments.large_longest}
    large["sequence_length"] = arguments.large_sequence_length
    parts = {
        "agreement": lambda: measure_agreement(arguments),
        "loop": lambda: measure_loop(arguments, **small),
        "small": lambda: measure_speed(arguments, **small, rounds=arguments.rounds),
        "large": lambda: measure_speed(arguments, **large, rounds=arguments.large_rounds),
    }
    results = {part: parts[part]() for part in arguments.parts}
    if arguments.output:
        own = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
        content = {
            "benchmark": "training",
            "date": date.today().isoformat(),
            "machine": arguments.machine,
            "versions": {"python": platform.python_version(), **own, "peers": peer_versions(arguments.trl_python)},
            "model": {"hidden_size": HIDDEN_SIZE, "layers": LAYERS, "precision": "fp32", "threads": THREADS},
            "results": results,
        }
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
