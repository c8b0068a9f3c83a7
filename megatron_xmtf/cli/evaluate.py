"""`xmtf evaluate`: rank classification and generation by language x task."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xmtf.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from megatron_xmtf.config import ParallelConfig

HELP = "Measure a checkpoint or a Hugging Face model on task files, by language and task."
EXAMPLE = """\
  xmtf evaluate --checkpoint OUT --tasks tasks.yaml --output OUT/evaluation --nproc 2 --tensor-model-parallel-size 2
  xmtf evaluate --hf DIR --tasks copa.yaml topics.yaml --output results
  xmtf evaluate train.yaml evaluation.tasks=[tasks.yaml]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG [key=value]",
        help="a run's configuration: its newest checkpoint is asked its evaluation.tasks",
    )
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", metavar="T.yaml", help="task files")
    parser.add_argument("--output", metavar="DIR", help="where results.json and report.html are written")
    parser.add_argument("--json", action="store_true", help="print what results.json holds instead of a table")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model is asked and how it is split; `xmtf generate` has the same arguments."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", metavar="CKPT", help="checkpoint, or a run directory (its newest checkpoint)")
    model.add_argument("--hf", metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--nproc", type=int, metavar="N", help="local ranks for a checkpoint (default: tp x pp)")
    parser.add_argument("--tensor-model-parallel-size", type=int, metavar="N", help="ranks that share each layer")
    parser.add_argument("--pipeline-model-parallel-size", type=int, metavar="N", help="pipeline stages")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of a checkpoint's model")


def parallel_from_arguments(
    arguments: argparse.Namespace, default: ParallelConfig | None = None
) -> tuple[ParallelConfig, int]:
    """Return the parallel sizes and the number of local ranks.

    Args:    default: of a run's configuration; sizes on the command line replace its own.
    Raises:  ConfigError: sizes below 1, or sizes for a Hugging Face directory, which one process runs.
    """
    from megatron_xmtf.config import ParallelConfig, config_from_mapping

    given = {
        "tensor_model_parallel_size": arguments.tensor_model_parallel_size,
        "pipeline_model_parallel_size": arguments.pipeline_model_parallel_size,
    }
    sizes = {name: size for name, size in given.items() if size is not None}
    if arguments.hf and (sizes or arguments.nproc not in (None, 1)):
        raise ConfigError(
            "a Hugging Face directory runs in one process, without --nproc and parallel sizes; "
            "`xmtf import --hf DIR --output CKPT` makes a checkpoint that can be split."
        )
    values = {**(default.model_dump() if default else {}), **sizes}
    parallel = config_from_mapping(values, ParallelConfig, source="command line")
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return parallel, arguments.nproc if arguments.nproc is not None else ranks


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write results.json and report.html, print the table."""
    from megatron_xmtf.evaluation.aggregate import results_table
    from megatron_xmtf.evaluation.evaluate import describe_checkpoint, evaluate_checkpoint, evaluate_huggingface
    from megatron_xmtf.evaluation.results import EvaluatedModel, results_mapping, write_results
    from megatron_xmtf.evaluation.tasks import load_tasks
    from megatron_xmtf.report.evaluation import evaluation_page

    checkpoint, task_files, output, default = _what_is_asked(arguments)
    parallel, world_size = parallel_from_arguments(arguments, default)
    tasks = load_tasks(task_files)
    if arguments.hf:
        model = EvaluatedModel(model=str(arguments.hf), step=None, config_hash=None)
        results = evaluate_huggingface(arguments.hf, tasks, own_process=False)
    else:
        model = describe_checkpoint(checkpoint)
        results = evaluate_checkpoint(
            model.model, tasks, parallel=parallel, world_size=world_size, precision=arguments.precision
        )
    if os.environ.get("RANK", "0") != "0":
        return int(ExitCode.DONE)  # under torchrun or srun every rank has the results, and one writes them
    write_results(output / "results.json", model, results)
    evaluation_page(model, results).write(output / "report.html")
    if arguments.json:
        print(json.dumps(results_mapping(model, results), indent=2, ensure_ascii=False))
    else:
        print(results_table(results))
        print(f"\n{output / 'results.json'}\n{output / 'report.html'}")
    return int(ExitCode.DONE)


def _what_is_asked(
    arguments: argparse.Namespace,
) -> tuple[str, list[Path], Path, ParallelConfig | None]:
    """Return checkpoint (empty for --hf), task files, output and the run's parallel sizes.

    Raises:  ConfigError: neither or both of a configuration and a model, no task, no output.
    """
    output = Path(arguments.output) if arguments.output else None
    task_files = [Path(name) for name in arguments.tasks or []]
    if arguments.hf or arguments.checkpoint:
        if arguments.config:
            raise ConfigError(
                f"a configuration ({arguments.config[0]}) and --checkpoint or --hf were given; give one of them."
            )
        if not task_files or output is None:
            raise ConfigError("--tasks T.yaml and --output DIR are needed with --checkpoint and --hf.")
        return arguments.checkpoint or "", task_files, output, None
    if not arguments.config:
        raise ConfigError("name a model: CONFIG, --checkpoint CKPT or --hf DIR.")
    from megatron_xmtf.config import load_config

    config = load_config(arguments.config[0], arguments.config[1:])
    task_files = task_files or [Path(name) for name in config.evaluation.tasks]
    if not task_files:
        raise ConfigError(f"{arguments.config[0]}: evaluation.tasks names no task file; name one, or use --tasks.")
    return config.output, task_files, output or Path(config.output) / "evaluation", config.parallel
