"""`xmtf quickstart`: the whole path on the embedded default."""

from __future__ import annotations

import argparse

from megatron_xmtf.errors import ExitCode

HELP = "Run the whole path on small real data: finetune a tiny model on English, ask it in 46 languages."

EXAMPLE = """  xmtf quickstart --output quickstart_output
  xmtf quickstart --output mt5_output --family mt5
  xmtf quickstart --output quickstart_output --nproc 1 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist or is empty")
    parser.add_argument(
        "--family", default="bloom", metavar="NAME", help="of the model: bloom (default), or mt5, an encoder-decoder"
    )
    parser.add_argument(
        "--nproc",
        type=int,
        default=4,
        metavar="N",
        help="local processes: 4 (default) finetunes at TP2 x PP2, 2 at PP2, 1 in one",
    )
    parser.add_argument("--json", action="store_true", help="print summary.json at the end instead of the story")


def run(arguments: argparse.Namespace) -> int:
    """Run all stages, then say what was learned."""
    import contextlib
    import json
    import logging
    import sys

    from megatron_xmtf.quickstart.clock import StageClock
    from megatron_xmtf.quickstart.families import find_family

    # A first-time user is not helped by every rank's view of its start.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # With --json standard output holds nothing but the JSON.
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        family = find_family(arguments.family)
        clock = StageClock(family.stage_budgets)
        with clock.stage("load", "torch, Megatron-Core, transformers"):
            from megatron_xmtf.quickstart.run import run_quickstart
        summary, words = run_quickstart(arguments.output, family=family, nproc=arguments.nproc, clock=clock)
    print(json.dumps(summary, indent=2, ensure_ascii=False) if arguments.json else words)
    return int(ExitCode.DONE)
