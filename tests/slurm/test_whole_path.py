"""From records to an exported model through a real Slurm: two nodes, preempted, told to stop, requeued, bit-identical.

Everything lies in a directory whose name a shell would take apart, and its `$(...)` would leave a file behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.training.launch import train
from tests.checkpoint.test_sharded import read_tensors
from tests.layouts import TP
from tests.slurm.virtual_cluster import VirtualCluster, wait_until
from tests.tiny import write_records, write_tiny_bloom

STEPS = 120
"""So many that on a fast machine a signal comes before the end."""
CURVE = ("loss", "grad_norm", "learning_rate", "rows", "examples", "tokens", "target_tokens")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / 'it\'s $(touch broken) "here"'
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_tiny_bloom(directory / "hf")
    write_records(directory / "records.jsonl", 400)
    (directory / "questions.jsonl").write_text(
        "\n".join(json.dumps({"inputs": "ab", "targets": "c", "choices": ["c", "d"]}) for _ in range(4)) + "\n"
    )
    task = {"name": "letters", "language": "en", "records": "questions.jsonl", "metric": "accuracy", "chance": 0.5}
    (directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    values = {
        "model": "imported",
        "output": "runs/first",
        "data": {"train": [{"prefix": "data/train"}]},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64},
        "schedule": {"train_steps": STEPS},
        "parallel": {TP: 2},
        "optimizer": {"lr": 1e-3},
        "dropout": {"hidden_dropout": 0.1},
        "precision": "fp32",
        "checkpoint": {"save_interval": 40, "keep_every": 40},
        "slurm": {
            "nodes": 2,
            "ranks_per_node": 2,
            "time": "01:00:00",
            "signal_seconds": 60,
            "partition": "low",
            "setup": ["export ONLY_FOR_THE_JOB=yes"],
            "environment": {"GLOO_SOCKET_IFNAME": "lo", "QUOTED": "it's $(touch broken)"},
            "node_local_directory": str(tmp_path),
        },
    }
    (directory / "train.yaml").write_text(yaml.safe_dump(values))
    yield directory
    assert not [path for path in (*directory.rglob("broken"), *tmp_path.rglob("broken"))], "a shell read a name"


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def put(*words: str) -> str:
        capsys.readouterr()
        assert main(["submit", "train.yaml", "--parsable", *words]) == 0
        return capsys.readouterr().out.strip()

    return put


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["step"]: line for line in lines}


def log(run: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((run / "slurm").glob("*.out")))


@pytest.mark.slow  # two to five minutes: three starts of four ranks on whatever cores there are
def test_from_records_to_an_exported_model(
    site: Path, submit: Callable[..., str], cluster: VirtualCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run = site / "runs" / "first"
    data = submit("--", "preprocess", "--input", "records.jsonl", "--tokenizer", "hf", "--output-prefix", "data/train")
    model = submit("--", "import", "--hf", "hf", "--output", "imported")
    index = submit("--after", data, "--after", model, "--", "pack", "train.yaml")
    job = submit("--after", index)
    export = submit("--after", job, "--", "export", "--checkpoint", "runs/first", "--output", "exported")
    for made in (data, model, index):
        assert cluster.wait_for(made) == "COMPLETED", log(run)

    def reach(step: int) -> None:
        wait_until(lambda: max(metrics(run), default=0) >= step or cluster.state(job) == "FAILED", f"step {step}")
        assert cluster.state(job) == "RUNNING", log(run)

    # A job of a partition that goes first: the ranks get SIGTERM, save, and the job waits for its turn.
    reach(3)
    urgent = cluster.ask("sbatch", "--parsable", "-phigh", "-N3", "--output=/dev/null", "--wrap=true")
    assert cluster.wait_for(urgent) == "COMPLETED", log(run)
    assert cluster.state(job) == "PENDING"
    # The next start is on other nodes: rank 0 goes where rank 2 was, and there they meet.
    cluster.ask("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    preempted = max(metrics(run))
    assert json.loads((run / "status.json").read_text())["exit_code"] == 3
    assert cluster.wait_for(job, "RUNNING") == "RUNNING"
    cluster.ask("scontrol", "update", "nodename=n1", "state=resume")
    # What Slurm does `signal_seconds` before the time is over: SIGUSR1 to the script alone.
    reach(preempted + 3)
    capsys.readouterr()
    assert main(["submit", "--status", "runs/first", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["attempts"], told["outcome"]) == (2, None)
    assert told["checkpoint_step"] >= preempted
    assert told["step"] > preempted and told["loss"] is not None
    assert {line["job"]: line["state"] for line in told["jobs"]}[job] == "RUNNING"
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job) == "COMPLETED", log(run)
    lines = [json.loads(line) for line in (run / "slurm" / "attempts.jsonl").read_text().splitlines()]
    assert [line["decision"] for line in lines if line["event"] == "end"] == ["requeue", "requeue", "done"]
    nodes = [line["nodes"] for line in lines if line["event"] == "begin"]
    assert nodes[:2] == ["n[1-2]", "n[2-3]"] and len(nodes) == 3
    assert not list(site.parent.glob("xmtf-*")), "caches on the nodes are removed"

    # The same curve and the same weights as of a run that nobody disturbed.
    whole = load_config("train.yaml", ["output=runs/whole"])
    assert train(whole, nproc=4)["last_step"] == STEPS
    ours, theirs = metrics(run), metrics(site / "runs" / "whole")
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    for step, line in theirs.items():
        assert [ours[step][key] for key in CURVE] == [line[key] for key in CURVE], step
    last = Path("checkpoints") / f"step_{STEPS:07d}"
    found, wanted = read_tensors(run / last), read_tensors(site / "runs" / "whole" / last)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    # Every checkpoint, asked in an array; and the model that waited for the run.
    words = [
        "evaluate",
        "--checkpoint",
        "{checkpoint}",
        "--tasks",
        "tasks.yaml",
        "--output",
        "asked/{step}",
        "--nproc",
        "1",
    ]
    asked = submit("--each-checkpoint", "--", *words)
    assert cluster.wait_for(export) == "COMPLETED", log(run)
    steps = [int(path.name.removeprefix("step_")) for path in sorted((run / "checkpoints").iterdir())]
    for number in range(len(steps)):
        assert cluster.wait_for(f"{asked}_{number}") == "COMPLETED", log(run)
    assert set(steps) >= {40, 80, 120}
    for step in steps:
        assert json.loads((site / "asked" / str(step) / "results.json").read_text())["step"] == step
    assert main(["verify", "--checkpoint", "runs/first", "--hf", "exported", "--weights-only"]) == 0


@pytest.mark.slow
def test_an_evaluation_over_two_nodes(site: Path, submit: Callable[..., str], cluster: VirtualCluster) -> None:
    """Four ranks of a plain srun, TP2 x DP2, find what `transformers` finds in one process."""
    from megatron_xmtf.conversion.huggingface import import_huggingface

    import_huggingface(site / "hf", site / "imported")
    asked = ["--tasks", "tasks.yaml", "--output"]
    words = ["evaluate", "--checkpoint", "imported", *asked, "asked/wide", "--tensor-model-parallel-size", "2"]
    job = submit("--nodes", "2", "--", *words)
    assert main(["evaluate", "--hf", "hf", *asked, "asked/alone"]) == 0
    assert cluster.wait_for(job) == "COMPLETED", log(site / "runs" / "first")
    wide, alone = (json.loads((site / "asked" / name / "results.json").read_text()) for name in ("wide", "alone"))
    assert wide["results"] and wide["results"] == alone["results"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_the_time_limit_itself(launcher: str, site: Path, submit: Callable[..., str], cluster: VirtualCluster) -> None:
    """Slurm signals by itself, before two minutes are over; the run ends in one of the next starts."""
    from megatron_xmtf.conversion.huggingface import import_huggingface

    import_huggingface(site / "hf", site / "imported")
    words = ["preprocess", "--input", "records.jsonl", "--tokenizer", "hf", "--output-prefix", "data/train"]
    assert main(words) == 0
    assert main(["pack", "train.yaml", "schedule.train_steps=3000"]) == 0
    words = ["slurm.time=2", "stop.slurm_margin_minutes=0", f"slurm.launcher={launcher}", "schedule.train_steps=3000"]
    job = submit(*words)
    run = site / "runs" / "first"
    cluster.wait_for(job, "RUNNING")
    wait_until(lambda: (run / "status.json").is_file(), "the run to be told to stop")
    assert json.loads((run / "status.json").read_text())["exit_code"] == 3, log(run)
    assert "SIGUSR1: the ranks are told to save and end" in log(run)
    wait_until(lambda: cluster.state(job) == "PENDING", "the job to be back in the queue")
    assert max(metrics(run)) > 1
