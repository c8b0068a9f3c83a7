"""`xmtf plan`: what a run will read, before any GPU hour."""

from __future__ import annotations

import argparse
import json

from megatron_xmtf.errors import ExitCode

HELP = "say what a run will read, by dataset and language, before any GPU hour"

EXAMPLE = """\
  xmtf plan train.yaml
  xmtf plan train.yaml batch.sequence_length=1024 --by template --all
  xmtf plan train.yaml --html plan.html
  xmtf plan train.yaml --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xmtf plan`."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as schedule.train_steps=100")
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="count by this column of the data as well: template, task ... (may be given several times)",
    )
    parser.add_argument("--all", action="store_true", help="print every line of every table, however small")
    parser.add_argument("--html", metavar="FILE", help="also write a page with pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every figure")


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, and draw if asked to."""
    from megatron_xmtf.config import load_config
    from megatron_xmtf.planning import build_data_plan
    from megatron_xmtf.report.plan_table import word_data_plan

    plan = build_data_plan(load_config(arguments.config, arguments.overrides), by=arguments.by)
    if arguments.html:
        from megatron_xmtf.report.data_plan import data_plan_page

        data_plan_page(plan, title=arguments.config).write(arguments.html)
    if arguments.json:
        print(json.dumps({"config": arguments.config, "data": plan}, ensure_ascii=False, allow_nan=False))
    else:
        print(word_data_plan(plan, fold=not arguments.all))
        if arguments.html:
            print(f"\n{'page':<9}{arguments.html}")
    return int(ExitCode.DONE)
