"""xmtf submit: put a run, or any other verb, into a Slurm queue; look after it; stop it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import ConfigError, ExitCode, MissingError

if TYPE_CHECKING:
    from megatron_xmtf.cluster.attempts import Limits
    from megatron_xmtf.cluster.checks import Finding
    from megatron_xmtf.config.schema import RunConfig
    from megatron_xmtf.config.slurm import SlurmConfig

HELP = "Put a run or another verb into a Slurm queue: checked first, requeued by itself; --status, --stop."
EXAMPLE = """\
  xmtf submit train.yaml --nodes 4 --time 20:00:00 --dry-run
  xmtf submit train.yaml --chain 3
  xmtf submit train.yaml slurm.partition=cpu -- preprocess --input r.jsonl --tokenizer models/bloom --output-prefix d
  xmtf submit train.yaml --each-checkpoint -- evaluate --checkpoint {checkpoint} --tasks t.yaml --output e/{step}
  xmtf submit train.yaml --sweep sweep.yaml --max-running 4
  xmtf submit --status runs/first
  xmtf submit --stop runs/first"""

JOB_VERBS = (
    *("render", "preprocess", "merge", "pack", "plan", "import", "average"),
    *("export", "verify", "evaluate", "generate", "inspect"),
)
RANK_VERBS = ("evaluate", "generate")
"""Verbs that run over several nodes."""
GPU_VERBS = ("evaluate", "generate", "verify")
INPUTS = ("input", "tokenizer", "checkpoint", "hf", "deepspeed", "megatron", "tasks")
"""Arguments of verbs that name files to be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config",
        nargs="?",
        help="run configuration (YAML) or recipe; in front of `-- VERB ...` only its keys output and slurm count",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as in slurm.partition=gpu")
    parser.add_argument("--overlay", action="append", default=[], metavar="FILE", help="YAML laid over it (repeatable)")
    parser.add_argument("--nodes", type=int, metavar="N", help="slurm.nodes")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="slurm.ranks_per_node")
    parser.add_argument("--time", metavar="T", help="slurm.time: limit of one job, as 20:00:00")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each goes on where one had to end")
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="wait until JOB has ended well")
    parser.add_argument("--sweep", metavar="FILE", help="YAML, name -> list of overrides: one run each, in OUTPUT/NAME")
    parser.add_argument("--each-checkpoint", action="store_true", help="run VERB for each {checkpoint} and {step}")
    parser.add_argument("--max-running", type=int, metavar="K", help="elements of an array that run at once")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, submit nothing")
    parser.add_argument("--parsable", action="store_true", help="print what a next job gives to --after, and no more")
    parser.add_argument("--status", metavar="OUT", help="jobs, attempts, loss of a run")
    parser.add_argument("--log", type=int, default=0, metavar="N", help="with --status: the last N lines of the log")
    parser.add_argument("--stop", metavar="OUT", help="let a run save and end, for good; cancel what waits of it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    inside = parser.add_argument_group("what job scripts call")
    inside.add_argument(
        "--begin-attempt", metavar="OUT", help="count a start; prints `train 0`, `done 0` or `stop CODE`"
    )
    inside.add_argument(
        "--end-attempt", metavar="OUT", help="prints `requeue CODE`, `done 0`, `stop CODE` or `leave CODE`"
    )
    inside.add_argument("--submission", default="", metavar="S")
    inside.add_argument("--launcher-code", type=int, default=1, metavar="N")
    inside.add_argument("--told-to-stop", action="store_true")
    inside.add_argument("--cancelled", action="store_true")
    inside.add_argument("--link", type=int, default=1, metavar="K")
    inside.add_argument("--links", type=int, default=1, metavar="N")
    inside.add_argument("--max-attempts-without-progress", type=int, default=3, metavar="N")
    inside.add_argument("--max-attempts", type=int, metavar="N")
    inside.add_argument("--requeue-on", nargs="*", default=[], metavar="OUTCOME")


def run(arguments: argparse.Namespace) -> int:
    """Submit, or tell, or stop."""
    if arguments.begin_attempt or arguments.end_attempt:
        return _attempt(arguments)
    if arguments.status:
        return _status(arguments)
    if arguments.stop:
        return _stop(arguments)
    if not arguments.config:
        raise ConfigError("name what to submit: a configuration, or --status OUT, or --stop OUT.")
    if arguments.chain < 1 or (arguments.max_running is not None and arguments.max_running < 1):
        raise ConfigError(f"--chain {arguments.chain} and --max-running {arguments.max_running}: at least 1 is needed.")
    from megatron_xmtf.cluster.submission import after_all

    after_all(arguments.after)
    arguments.overrides += [
        f"slurm.{key}={value}"
        for key, value in (("ranks_per_node", arguments.ranks_per_node), ("time", arguments.time))
        if value is not None
    ]
    return _submit_training(arguments) if arguments.command is None else _submit_command(arguments)


def _submit_training(arguments: argparse.Namespace) -> int:
    from megatron_xmtf.cluster import checks
    from megatron_xmtf.cluster.render import render_train
    from megatron_xmtf.cluster.shell import slug
    from megatron_xmtf.cluster.submission import new_submission, planned_runs, submit, write_runs

    if arguments.each_checkpoint:
        raise ConfigError("--each-checkpoint needs a verb for them: -- evaluate --checkpoint {checkpoint} ...")
    if arguments.nodes is not None:
        arguments.overrides.append(f"slurm.nodes={arguments.nodes}")
    base, names, configs, architecture = _load_runs(arguments)
    if arguments.chain > 1 and len(configs) > 1:
        raise ConfigError("--chain and --sweep: the runs of a sweep go on by requeue, each by itself.")
    submission, slurm = new_submission(), base.slurm
    runs = planned_runs(configs, submission=submission)
    text = render_train(
        runs,
        slurm=slurm,
        job_name=slurm.job_name or slug(Path(base.output).name),
        working_directory=Path.cwd(),
        submission=submission,
        max_running=arguments.max_running,
    )
    findings = _name_runs(names, [_check_run(config, architecture, arguments) for config in configs])
    named = [base.output, base.model, *_prefixes(base)]
    seen = [Path(path).absolute() for path in named if path != checks.UNNAMED and not path.startswith("preset:")]
    findings += checks.check_paths([*seen, *_interpreter(slurm)], nodes=slurm.nodes)
    findings += checks.check_container(slurm, seen, working_directory=Path.cwd())
    findings += checks.check_script(text, slurm, nodes=slurm.nodes, is_dry=arguments.dry_run)

    def put() -> Any:
        write_runs(configs, runs)
        directory = Path(base.output).absolute() / "slurm"
        return submit(
            text,
            directory=directory,
            submission=submission,
            kind="train",
            output=directory.parent,
            elements=[run.output for run in runs] if len(runs) > 1 else (),
            links=arguments.chain,
            after=arguments.after,
        )

    return _finish(arguments, text, findings, put)


def _submit_command(arguments: argparse.Namespace) -> int:
    from megatron_xmtf.cluster import checks
    from megatron_xmtf.cluster.render import render_commands
    from megatron_xmtf.cluster.shell import slug
    from megatron_xmtf.cluster.submission import new_submission, submit

    if arguments.chain > 1 or arguments.sweep:
        raise ConfigError("--chain and --sweep are for training.")
    verb = arguments.command[0] if arguments.command else ""
    if verb not in JOB_VERBS:
        raise ConfigError(f"-- {verb}: a job runs one of {', '.join(JOB_VERBS)}; a run is submitted without `--`.")
    output, slurm = _load_job(arguments)
    nodes = arguments.nodes or 1
    if nodes > 1 and verb not in RANK_VERBS:
        raise ConfigError(f"--nodes {nodes}: {verb} runs on one node; {' and '.join(RANK_VERBS)} on several.")
    commands = _commands(arguments, output)
    if nodes > 1 and any(word.partition("=")[0] == "--hf" for word in arguments.command):
        raise ConfigError(f"--nodes {nodes}: --hf is read by one process; import it, and name --checkpoint.")
    text = render_commands(
        commands,
        slurm=slurm,
        job_name=f"{slurm.job_name or slug(output.name)}-{verb}",
        working_directory=Path.cwd(),
        nodes=nodes,
        uses_gpus=verb in GPU_VERBS,
        max_running=arguments.max_running,
    )
    findings = _check_commands(commands, arguments)
    findings += checks.check_paths([output, Path.cwd(), *_interpreter(slurm)], nodes=nodes)
    findings += checks.check_container(slurm, [output.absolute()], working_directory=Path.cwd())
    findings += checks.check_script(text, slurm, nodes=nodes, is_dry=arguments.dry_run)

    def put() -> Any:
        directory = output.absolute() / "slurm"
        return submit(
            text,
            directory=directory,
            submission=new_submission(),
            kind=verb,
            output=output.absolute(),
            after=arguments.after,
        )

    return _finish(arguments, text, findings, put)


def _load_runs(arguments: argparse.Namespace) -> tuple[RunConfig, list[str], list[RunConfig], Any]:
    """Return the base configuration, names and configurations of the runs, and the model's architecture if it is known.

    A dry run of a recipe may leave out which model and where.
    """
    from megatron_xmtf.cluster.sweep import load_sweep
    from megatron_xmtf.config import load_config
    from megatron_xmtf.errors import XmtfError
    from megatron_xmtf.planning.run_model import load_plan_config, run_architecture

    words, overlays = arguments.overrides, arguments.overlay
    if arguments.dry_run and not overlays:
        base, _ = load_plan_config(arguments.config, words)
    else:
        base = load_config(arguments.config, words, overlays=overlays)
    try:
        architecture = run_architecture(arguments.config, base)
    except XmtfError:
        architecture = None  # `check_inputs` says what is wrong with it
    if not arguments.sweep:
        return base, [""], [base], architecture
    runs = load_sweep(arguments.sweep, arguments.config, words, overlays=overlays, output=base.output)
    return base, list(runs), list(runs.values()), architecture


def _load_job(arguments: argparse.Namespace) -> tuple[Path, SlurmConfig]:
    """Return where notes and logs of a job go, and its `slurm` section; other keys do not count."""
    from megatron_xmtf.config.load import config_from_mapping, load_values
    from megatron_xmtf.config.slurm import SlurmConfig

    values = load_values(arguments.config, arguments.overrides, overlays=arguments.overlay)
    if not isinstance(values.get("output"), str):
        raise ConfigError(f"{arguments.config}: key 'output' is required: scripts and logs go to OUTPUT/slurm.")
    slurm = config_from_mapping(values.get("slurm") or {}, SlurmConfig, source=f"{arguments.config}: slurm")
    return Path(values["output"]), slurm


def _check_run(config: RunConfig, architecture: Any, arguments: argparse.Namespace) -> list[Finding]:
    from megatron_xmtf.cluster import checks

    found = checks.check_sizes(config)
    if checks.UNNAMED in (config.model, config.output):
        found.append(checks.Finding("note", "inputs", "not looked at: add model=DIR and output=DIR"))
    elif not any(finding.level == "error" for finding in found):
        found += checks.check_inputs(config, is_waiting=bool(arguments.after))
    found += checks.check_time(config, architecture, links=arguments.chain)
    return found + checks.check_disk(config, architecture)


def _name_runs(names: Sequence[str], findings: Sequence[list[Finding]]) -> list[Finding]:
    """Put the name of the run before what was found of it, where there are several."""
    from dataclasses import replace

    return [
        replace(finding, text=f"{name}: {finding.text}" if name else finding.text)
        for name, found in zip(names, findings, strict=True)
        for finding in found
    ]


def _interpreter(slurm: SlurmConfig) -> list[Path]:
    """Return the directory of the environment that jobs run in, where it is this one."""
    return [Path(sys.prefix)] if slurm.python is None and slurm.container is None else []


def _prefixes(config: RunConfig) -> Iterator[str]:
    for dataset in config.data.training_datasets:
        yield dataset.prefix


def _commands(arguments: argparse.Namespace, output: Path) -> list[list[str]]:
    """Return the words of each element; one, or one a checkpoint."""
    words: list[str] = arguments.command
    if not arguments.each_checkpoint:
        return [words]
    from megatron_xmtf.checkpoint.directory import list_checkpoints

    if not any("{checkpoint}" in word for word in words) or not any("{step}" in word for word in words):
        raise ConfigError("--each-checkpoint: {checkpoint} and, in what is written, {step} must be among the words.")
    if not output.is_dir() or not list_checkpoints(output):
        raise MissingError(f"{output} holds no finished checkpoint; --each-checkpoint takes those that are there now.")
    return [
        [word.replace("{checkpoint}", str(path)).replace("{step}", str(step)) for word in words]
        for step, path in list_checkpoints(output)
    ]


def _check_commands(commands: Sequence[Sequence[str]], arguments: argparse.Namespace) -> list[Finding]:
    """Parse each command as the job will, and look whether what it reads is there."""
    from megatron_xmtf.cli import parse
    from megatron_xmtf.cluster.checks import Finding

    missing = []
    for command in commands:
        parsed = vars(parse(command))
        for name in INPUTS:
            values = parsed.get(name) or []
            for value in [values] if isinstance(values, str) else values:
                if not Path(value).exists():
                    missing.append(f"--{name} {value}")
    if missing and arguments.after:
        return [Finding("note", "inputs", f"not there yet, the jobs before must make it: {', '.join(missing)}")]
    if missing:
        return [Finding("error", "inputs", f"does not exist: {', '.join(missing)}")]
    return [Finding("ok", "inputs", "the command line is right, and what it reads is there")]


def _finish(arguments: argparse.Namespace, text: str, findings: Sequence[Finding], put: Any) -> int:
    """Tell the findings, then submit unless one forbids it."""
    from dataclasses import asdict

    errors = [finding for finding in findings if finding.level == "error"]
    for finding in findings if not arguments.json else ():
        if not arguments.parsable or finding.level in ("warning", "error"):
            print(finding, file=sys.stderr)
    submitted = None if errors or arguments.dry_run else put()
    if arguments.json:
        report = {
            "findings": [asdict(finding) for finding in findings],
            "script": text if submitted is None else str(submitted.script),
            "jobs": [] if submitted is None else submitted.jobs,
            "wait_for": None if submitted is None else submitted.wait_for,
        }
        print(json.dumps(report, ensure_ascii=False))
    elif submitted is not None and arguments.parsable:
        print(submitted.wait_for)
    elif submitted is not None:
        print(f"submitted {' '.join(submitted.jobs)}: {submitted.script}")
        print(f"next: xmtf submit --status {submitted.script.parent.parent}")
    elif arguments.dry_run:
        print(text, end="")
    if errors:
        print(f"xmtf submit: {len(errors)} things to mend first; nothing was submitted", file=sys.stderr)
    return int(ExitCode.USER if errors else ExitCode.DONE)


def _status(arguments: argparse.Namespace) -> int:
    from megatron_xmtf.cluster.status import run_status

    status = run_status(arguments.status)
    if arguments.json:
        print(json.dumps(status.to_mapping(), ensure_ascii=False))
        return int(ExitCode.DONE)
    print(status.table())
    if arguments.log and status.log is not None:
        lines = Path(status.log).read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(["", *lines[-arguments.log :]]))
    return int(ExitCode.DONE)


def _stop(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from megatron_xmtf.cluster.status import stop_run

    stopped = stop_run(arguments.stop)
    if arguments.json:
        print(json.dumps(asdict(stopped)))
        return int(ExitCode.DONE)
    for path in stopped.stop:
        print(f"{path}: the run saves and ends after its step")
    if stopped.cancelled:
        print(f"cancelled what waited: {' '.join(stopped.cancelled)}")
    for why in stopped.unanswered:
        print(f"what waits in the queue was not cancelled ({why}): its next start finds the file", file=sys.stderr)
    return int(ExitCode.DONE)


def _attempt(arguments: argparse.Namespace) -> int:
    """Print a decision for the script; why, on standard error, for the log."""
    from megatron_xmtf.cluster.attempts import begin_attempt, end_attempt

    limits = _limits(arguments)
    if arguments.begin_attempt:
        decision = begin_attempt(Path(arguments.begin_attempt), submission=arguments.submission, limits=limits)
    else:
        decision = end_attempt(
            Path(arguments.end_attempt),
            submission=arguments.submission,
            launcher_code=arguments.launcher_code,
            limits=limits,
            told_to_stop=arguments.told_to_stop,
            is_cancelled=arguments.cancelled,
            link=arguments.link,
            links=arguments.links,
        )
    print(f"xmtf submit: {decision.word}: {decision.why}", file=sys.stderr)
    print(decision)
    return int(ExitCode.DONE)


def _limits(arguments: argparse.Namespace) -> Limits:
    from megatron_xmtf.cluster.attempts import Limits

    return Limits(
        without_progress=arguments.max_attempts_without_progress,
        in_all=arguments.max_attempts,
        requeue_on=tuple(arguments.requeue_on),
    )
