"""xmtf train: train a model; starts local ranks itself, or joins torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_xmtf.config import RunConfig

HELP = "Train: tensor x pipeline x data parallel, on CPU or GPU; starts N local ranks, or joins torchrun."
EXAMPLE = """\
  xmtf train train.yaml --nproc 4 parallel.tensor_model_parallel_size=2 optimizer.lr=1e-4
  torchrun --nproc-per-node 8 -m megatron_xmtf train train.yaml
  xmtf train bloomz-560m data.mixture_root=data model=models/bloom-560m output=runs/z --overlay toy --nproc 2
  xmtf train bloomz-176b data.mixture_root=data model=models/bloom output=runs/z --dry-run --world-size 288"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", help="run configuration (YAML), or a shipped recipe: bloomz-560m ... bloomz-176b")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as in optimizer.lr=1e-4")
    parser.add_argument("--nproc", type=int, default=1, help="local ranks to start (default 1)")
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML laid over the configuration, before the overrides; `toy` makes a recipe small (repeatable)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, build the packing index, size what each rank will hold, and stop; the model's weights "
        "need not be there",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: ranks that the run will have (default --nproc)"
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
    from megatron_xmtf.errors import ConfigError
    from megatron_xmtf.training.launch import train

    config = load_config(arguments.config, arguments.overrides, overlays=arguments.overlay)
    if arguments.dry_run:
        return _dry_run(config, arguments)
    if arguments.world_size is not None:
        raise ConfigError("--world-size is for --dry-run; to train, start N ranks with --nproc N or with a launcher.")
    # With --json standard output holds the result alone; the lines of the steps go where the other messages are.
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        result = train(config, nproc=arguments.nproc, allowed_changes=arguments.allow_change)
    if os.environ.get("RANK", "0") != "0":
        return result["exit_code"]
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
        if result["stopped_by"]:
            print(f"stopped by {result['stopped_by']}; {_remedy(result['exit_code'])}")
    return result["exit_code"]


def _remedy(exit_code: int) -> str:
    return "the same command goes on" if exit_code else "remove the file, and the same command goes on"


def _dry_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Check and size; under a launcher on its first rank alone."""
    import json
    import logging

    from megatron_xmtf.parallel.launch import joined_by_launcher, prepare_to_fork
    from megatron_xmtf.parallel.topology import world_size_from_environment
    from megatron_xmtf.training.dry_run import dry_run

    joined = joined_by_launcher()
    if joined and os.environ["RANK"] != "0":
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_to_fork()
    here = world_size_from_environment() if joined else arguments.nproc
    world_size = here if arguments.world_size is None else arguments.world_size
    checked = dry_run(config, world_size=world_size, allowed_changes=arguments.allow_change)
    if arguments.json:
        print(json.dumps(checked.to_mapping()))
    else:
        print(f"{checked.table()}\n\neverything is in place; not trained")
    return 0
