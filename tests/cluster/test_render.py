"""Rendered scripts: clean for shellcheck, and word for word what was asked, whatever the words are; or refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cluster.render import TrainingRun, render_commands, render_train
from megatron_xmtf.cluster.shell import quote
from megatron_xmtf.config import config_from_mapping
from megatron_xmtf.config.slurm import SlurmConfig, seconds_of_time
from megatron_xmtf.errors import ConfigError

HOSTILE = [
    "it's here",
    "$(touch broken)",
    "`touch broken`",
    "a;b|c&d",
    'say "x"',
    "-rf *",
    "~",
    "$HOME",
    "é\\n",
    "{%x%}",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpus": {
        **{"nodes": 36, "gpus_per_node": 8, "gpu_type": "a100", "cpus_per_rank": 8, "account": "six@a100"},
        **{
            "partition": "gpu_p5",
            "qos": "qos_gpu-gc",
            "constraint": "a100&ib",
            "time": "4-04:00:00",
            "exclusive": True,
        },
        **{"reservation": "hug", "exclude": "r1i0n[03-04,07]", "memory_gib_per_node": 0, "extra": ["--mail-type=END"]},
    },
    "caches": {"node_local_directory": "/tmp/my cache", "setup": ["module load cuda", "ulimit -c 0"], "requeue": False},
    "torchrun": {"launcher": "torchrun", "nodes": 2, "ranks_per_node": 4, "cpus_per_rank": 2},
    "apptainer": {"container": {"image": "it's.sif", "mounts": ["/a b:/c"]}, "environment": {"A": "$(x)"}},
    "pyxis": {"container": {"image": "nvcr.io#nvidia/pytorch:25.04-py3", "runtime": "pyxis", "mounts": ["/s"]}},
}


def slurm(**values: Any) -> SlurmConfig:
    return config_from_mapping(values, SlurmConfig, source="test")


def scripts(settings: dict[str, Any]) -> dict[str, str]:
    common: dict[str, Any] = {
        "slurm": slurm(**settings),
        "job_name": "job",
        "working_directory": Path("/project/it's $(x)"),
    }
    runs = [TrainingRun(Path(f"/o/{name}/c.yaml"), Path(f"/o/{name}")) for name in ("it's", "$(two)")]
    return {
        "train": render_train(runs[:1], submission="s", **common),
        "sweep": render_train(runs, submission="s", max_running=1, **common),
        "command": render_commands([["export", "--output", "a b"]], **common),
        "array": render_commands(
            [["evaluate", "--output", name] for name in HOSTILE], nodes=2, uses_gpus=True, **common
        ),
    }


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (.ci/run does, as root)")
@pytest.mark.parametrize("name", SETTINGS)
def test_shellcheck_finds_nothing(name: str, tmp_path: Path) -> None:
    for kind, text in scripts(SETTINGS[name]).items():
        (tmp_path / f"{kind}.sh").write_text(text)
    done = subprocess.run(["shellcheck", *map(str, tmp_path.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SETTINGS)
def test_bash_reads_it(name: str) -> None:
    for text in scripts(SETTINGS[name]).values():
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def run_script(text: str, directory: Path, **variables: str) -> list[str]:
    """Run a script with an srun that writes its words down; return those behind its own options."""
    (directory / "bin").mkdir(exist_ok=True)
    fake = directory / "bin" / "srun"
    fake.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {quote(str(directory / 'words'))}\n")
    fake.chmod(0o755)
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(directory)}
    environment |= variables
    done = subprocess.run(["bash", "-s"], input=text, text=True, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    words = (directory / "words").read_text().split("\0")[:-1]
    return words[next(place for place, word in enumerate(words) if not word.startswith("--")) :]


def test_words_come_through_as_they_are(tmp_path: Path) -> None:
    where = tmp_path / "it's $(touch broken)"
    where.mkdir()
    command = ["export", "--output", *HOSTILE]
    settings = slurm(python="/opt/my python", environment={"X": HOSTILE[0]})
    text = render_commands([command], slurm=settings, job_name="j", working_directory=where)
    assert run_script(text, tmp_path) == ["/opt/my python", "-m", "megatron_xmtf", *command]
    elements = [["evaluate", "--output", word] for word in HOSTILE]
    text = render_commands(elements, slurm=settings, job_name="j", working_directory=where)
    for number, element in enumerate(elements):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}
        assert run_script(text, tmp_path, **array)[3:] == element
        assert (tmp_path / f"ended-7_{number}").read_text() == "0\n"
    assert (tmp_path / "ended-1").read_text() == "0\n"
    assert not list(tmp_path.rglob("broken"))


@pytest.mark.parametrize("letter", ["\n", "\r", "\0", "\x1b", "\x7f", "\u2028"])
def test_control_characters_are_refused_everywhere(letter: str) -> None:
    bad = f"a{letter}#SBATCH --uid=root"
    common: dict[str, Any] = {"job_name": "j", "working_directory": Path("/w")}
    with pytest.raises(ConfigError, match="control character"):
        render_commands([["export", "--output", bad]], slurm=slurm(), **common)
    with pytest.raises(ConfigError, match="control character"):
        render_train([TrainingRun(Path(bad), Path("/o"))], slurm=slurm(), submission="s", **common)
    for values in ({"setup": [bad]}, {"environment": {"X": bad}}, {"extra": [f"--x={bad}"]}, {"python": bad}):
        with pytest.raises(ConfigError, match="control character"):
            slurm(**values)


@pytest.mark.parametrize(
    "key", ["job_name", "account", "partition", "qos", "constraint", "reservation", "exclude", "gpu_type"]
)
@pytest.mark.parametrize("value", ["a b", "$(x)", "a;b", "`x`", "'", '"', "a\nb", "--uid=0", "", "a#b"])
def test_names_on_sbatch_lines_are_of_an_allow_list(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        slurm(**{key: value, "gpus_per_node": 1})


@pytest.mark.parametrize("name", ["A B", "1A", "A=B", "A;B", ""])
def test_names_of_variables_are_names(name: str) -> None:
    with pytest.raises(ConfigError):
        slurm(environment={name: "x"})


def test_directives_say_what_is_asked_for() -> None:
    lines = [line for line in scripts(SETTINGS["gpus"])["sweep"].splitlines() if line.startswith("#SBATCH")]
    assert [line.removeprefix("#SBATCH --") for line in lines] == [
        *(
            "job-name=job",
            "array=0-1%1",
            "nodes=36",
            "ntasks-per-node=8",
            "cpus-per-task=8",
            "gres=gpu:a100:8",
            "mem=0G",
        ),
        *("account=six@a100", "partition=gpu_p5", "qos=qos_gpu-gc", "constraint=a100&ib", "reservation=hug"),
        *("exclude=r1i0n[03-04,07]", "time=4-04:00:00", "output=%x-%A_%a.out", "open-mode=append", "exclusive"),
        *("requeue", "mail-type=END", "signal=B:USR1@600"),
    ]
    command = scripts(SETTINGS["gpus"])["command"]
    assert "gres" not in command  # an export needs no GPU
    assert "#SBATCH --cpus-per-task=64" in command


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(
            ("90", 5400),
            ("2:30", 150),
            ("20:00:00", 72000),
            ("4-4", 360000),
            ("4-04:00", 360000),
            ("1-00:00:01", 86401),
        ),
        *(
            ("0", None),
            ("0:0", None),
            ("1:2:3:4", None),
            ("x", None),
            ("-1", None),
            ("1-", None),
            ("1h", None),
            ("", None),
        ),
    ],
)
def test_times_are_slurms(text: str, seconds: int | None) -> None:
    """Values by the table in sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours ..."""
    assert seconds_of_time(text) == seconds
    if seconds is None:
        with pytest.raises(ConfigError, match="time"):
            slurm(time=text)
    else:
        assert slurm(time=text, signal_seconds=30).time == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time": "10", "signal_seconds": 600}, "told to stop before it starts"),
        ({"gpu_type": "a100"}, "needs gpus_per_node"),
        ({"gpus_per_node": 4, "ranks_per_node": 8}, "a rank takes a GPU"),
        ({"launcher": "torchrun", "container": {"image": "x.sif"}}, "use launcher=srun"),
        ({"nodez": 4}, "nearest: node"),
        ({"node_local_directory": "tmp"}, "node_local_directory"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slurm(**values)
