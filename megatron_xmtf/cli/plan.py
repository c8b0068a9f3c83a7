"""`xmtf plan`: what a run will read, and what it needs of a cluster, before any GPU hour."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from megatron_xmtf.errors import ExitCode

if TYPE_CHECKING:
    from megatron_xmtf.planning.data_plan import DataPlan
    from megatron_xmtf.planning.hardware_plan import HardwarePlan

HELP = "say what a run will read, and what it needs of a cluster: memory, time, better layouts"

EXAMPLE = """\
  xmtf plan train.yaml
  xmtf plan train.yaml batch.sequence_length=1024 --by template --all
  xmtf plan bloomz-176b --cluster jean-zay-a100-80 --gpus 288 --search
  xmtf plan train.yaml --cluster h100 --gpus 16 cluster.memory_gib=64 --html plan.html
  xmtf plan train.yaml --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xmtf plan`."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML), or a shipped recipe: bloomz-176b")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, such as schedule.train_steps=100; cluster.KEY=value changes the cluster",
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME|FILE",
        help="plan the hardware on this cluster: jean-zay-a100-80, a100-80, a100-40, h100, h200, or a YAML file",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that the run gets; needs --cluster")
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=5,
        default=0,
        metavar="K",
        help="look for the K fastest layouts as well (default 5); needs --cluster",
    )
    parser.add_argument(
        "--attention",
        choices=["reference", "sdpa", "fused"],
        help="plan as if attention were this one (default: what kernels.attention is on a GPU)",
    )
    parser.add_argument("--no-data", action="store_true", help="leave the data plan out")
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
    data, why_no_data, hardware = _plan(arguments)
    if arguments.html:
        _write_page(arguments, data, why_no_data, hardware)
    if arguments.json:
        report = {
            "config": arguments.config,
            "data": data,
            "why_no_data": why_no_data,
            "hardware": None if hardware is None else hardware.to_mapping(),
        }
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
        return int(ExitCode.DONE)
    parts = []
    if data is not None:
        from megatron_xmtf.report.plan_table import word_data_plan

        parts.append(word_data_plan(data, fold=not arguments.all))
    elif why_no_data:
        parts.append(f"{'data':<9}not planned: {why_no_data}")
    if hardware is not None:
        from megatron_xmtf.report.hardware_table import word_hardware_plan

        parts.append(word_hardware_plan(hardware, fold=not arguments.all))
    else:
        parts.append(f"{'hardware':<9}not planned: name a cluster, as in --cluster h100 --gpus 8 (--search)")
    if arguments.html:
        parts.append(f"{'page':<9}{arguments.html}")
    print("\n\n".join(parts))
    return int(ExitCode.DONE)


def _plan(arguments: argparse.Namespace) -> tuple[DataPlan | None, str, HardwarePlan | None]:
    """Plan the data and the hardware; return why there is no data plan where there is none."""
    from megatron_xmtf.config.load import load_config
    from megatron_xmtf.errors import ConfigError

    of_cluster = [word.removeprefix("cluster.") for word in arguments.overrides if word.startswith("cluster.")]
    overrides = [word for word in arguments.overrides if not word.startswith("cluster.")]
    if arguments.cluster is None:
        if arguments.gpus is not None or arguments.search or arguments.attention or of_cluster or arguments.no_data:
            raise ConfigError(
                "--gpus, --search, --attention, --no-data and cluster.KEY plan the hardware: name it with --cluster, "
                "as in --cluster h100."
            )
        from megatron_xmtf.planning.data_plan import build_data_plan

        return build_data_plan(load_config(arguments.config, overrides), by=arguments.by), "", None
    if arguments.gpus is None or arguments.gpus < 1 or arguments.search < 0:
        raise ConfigError(f"--cluster needs --gpus N, at least 1, as in --cluster {arguments.cluster} --gpus 8.")
    from megatron_xmtf.planning.cluster import load_cluster
    from megatron_xmtf.planning.data_at_hand import why_no_data
    from megatron_xmtf.planning.hardware_plan import plan_hardware
    from megatron_xmtf.planning.run_model import load_plan_config, run_architecture

    cluster = load_cluster(arguments.cluster, of_cluster)
    config, missing = load_plan_config(arguments.config, overrides)
    architecture = run_architecture(arguments.config, config)
    absent = "--no-data" if arguments.no_data else why_no_data(config, missing)
    data = None
    if not absent:
        from megatron_xmtf.planning.data_plan import build_data_plan

        data = build_data_plan(config, by=arguments.by)
    elif arguments.by:
        raise ConfigError(f"--by {arguments.by[0]} counts the data, which is not planned: {absent}.")
    fraction = None
    if data is not None:
        positions = data["run"]["rows"] * (
            data["sides"]["decoder_length"] if data["sides"] is not None else data["sequence_length"]
        )
        fraction = data["run"]["target_tokens"] / positions
    hardware = plan_hardware(
        config,
        architecture,
        cluster,
        gpus=arguments.gpus,
        attention=arguments.attention,
        loss_fraction=fraction,
        search=arguments.search,
    )
    return data, absent, hardware


def _write_page(
    arguments: argparse.Namespace, data: DataPlan | None, why_no_data: str, hardware: HardwarePlan | None
) -> None:
    """Write one page of both plans."""
    if data is not None:
        from megatron_xmtf.report.data_plan import data_plan_page

        page = data_plan_page(data, title=arguments.config)
    else:
        from megatron_xmtf.report.page import Page

        page = Page("Hardware plan", subtitle=f"{arguments.config} · data not planned: {why_no_data}")
    if hardware is not None:
        from megatron_xmtf.report.hardware_plan import add_hardware_plan

        add_hardware_plan(page, hardware)
    page.write(arguments.html)
