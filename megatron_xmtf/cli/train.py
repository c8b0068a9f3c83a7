"""xmtf train: train a model; starts local ranks itself, or joins torchrun."""

from __future__ import annotations

import argparse
import sys

HELP = "Train: tensor x pipeline x data parallel, on CPU or GPU; starts N local ranks, or joins torchrun."
EXAMPLE = """\
  xmtf train train.yaml --nproc 4 parallel.tensor_model_parallel_size=2 optimizer.lr=1e-4
  torchrun --nproc-per-node 8 -m megatron_xmtf train train.yaml
  xmtf train train.yaml --dry-run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as in optimizer.lr=1e-4")
    parser.add_argument("--nproc", type=int, default=1, help="local ranks to start (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, build the packing index, and stop before training"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let this key or section differ from the resumed checkpoint's configuration (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Train as the arguments say."""
    from contextlib import nullcontext, redirect_stdout

    from megatron_xmtf.config import load_config
    from megatron_xmtf.training.launch import train

    config = load_config(arguments.config, arguments.overrides)
    # With --json standard output holds the result alone; the lines of the steps go where the other messages are.
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        result = train(config, nproc=arguments.nproc, allowed_changes=arguments.allow_change, dry_run=arguments.dry_run)
    if result is None:
        return 0
    if arguments.json:
        import json

        print(json.dumps(result))
    elif result["checkpoint"] is None:
        print(f"nothing to do: step {result['last_step']} is done already")
    else:
        print(
            f"trained steps {result['first_step']} to {result['last_step']}: loss {result['first_loss']:.4f} -> "
            f"{result['last_loss']:.4f}; checkpoint {result['checkpoint']}"
        )
    return 0
