"""What becomes of jobs, on a real Slurm with ranks that do as they are told: requeue, limits, chains, stops, sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.cli import main
from tests.slurm.conftest import Submit
from tests.slurm.virtual_cluster import VirtualCluster, wait_until


def attempts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "slurm" / "attempts.jsonl").read_text().splitlines()]


def decisions(output: Path) -> list[tuple[str, int]]:
    return [(line["decision"], line["code"]) for line in attempts(output) if line["event"] == "end"]


def test_a_job_comes_back_until_the_run_is_done(submit: Submit, cluster: VirtualCluster, tmp_path: Path) -> None:
    (job,) = submit(script="3 10\n6 20\nsilent -\n3 40\n0 100\n")["jobs"]
    assert cluster.wait_for(job) == "COMPLETED"
    assert decisions(tmp_path / "run") == [("requeue", 3), ("requeue", 6), ("requeue", 1), ("requeue", 3), ("done", 0)]
    begun = [line for line in attempts(tmp_path / "run") if line["event"] == "begin"]
    assert [(line["restart"], line["step"]) for line in begun] == [(0, 0), (1, 10), (2, 20), (3, 20), (4, 40)]
    assert cluster.shown(job)["Restarts"] == "4"
    assert json.loads((tmp_path / "run" / "slurm" / "previous_status.json").read_text())["exit_code"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "decided", "why"),
    [
        (
            "3 10\n" + 3 * "1 -\n",
            [],
            [("requeue", 3), ("requeue", 1), ("requeue", 1), ("stop", 1)],
            "3 times from step 10",
        ),
        ("3 1\n3 2\n", ["slurm.max_attempts=2"], [("requeue", 3), ("stop", 3)], "slurm.max_attempts=2"),
        ("2 -\n", [], [("stop", 2)], "not started again"),
        ("1 -\n", ["slurm.requeue_on=[requeue]"], [("stop", 1)], "not started again"),
        ("3 5\n", ["slurm.requeue=false"], [("stop", 3)], "not started again"),
        ("0 50\n", [], [("stop", 1)], "code 0"),  # a stop file: what waits for a finished run must not start
    ],
)
def test_a_job_that_would_only_fail_again_ends(
    script: str, words: list[str], decided: Any, why: str, submit: Submit, cluster: VirtualCluster, tmp_path: Path
) -> None:
    (job,) = submit(*words, script=script)["jobs"]
    assert cluster.wait_for(job) == "FAILED"
    assert decisions(tmp_path / "run") == decided
    assert why in attempts(tmp_path / "run")[-1]["why"]
    assert cluster.shown(job)["ExitCode"] == f"{decided[-1][1]}:0"


@pytest.mark.slow
def test_a_chain_goes_on_where_a_job_had_to_end_and_no_further_than_the_run(
    submit: Submit, cluster: VirtualCluster, tmp_path: Path
) -> None:
    told = submit("--chain", "4", script="3 10\n3 20\n0 100\n")
    jobs = told["jobs"]
    (after,) = submit("--after", told["wait_for"], script="3 10\n3 20\n0 100\n", code=0)["jobs"]
    assert [cluster.wait_for(job) for job in jobs] == ["FAILED", "FAILED", "COMPLETED", "CANCELLED"]
    assert decisions(tmp_path / "run")[:3] == [("stop", 3), ("stop", 3), ("done", 0)]
    assert cluster.wait_for(after) == "COMPLETED"  # it finds the run done
    assert len([line for line in attempts(tmp_path / "run") if line["event"] == "begin"]) == 3


@pytest.mark.slow
def test_the_stop_switch_ends_what_runs_and_what_waits(
    submit: Submit, cluster: VirtualCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = submit("--chain", "2", script="wait 7\n")["jobs"]
    wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
    assert main(["submit", "--stop", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stop": ["run/stop"], "cancelled": [jobs[1]], "unanswered": []}
    assert cluster.wait_for(jobs[1]) == "CANCELLED"
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs[0])  # the stub does not look for the file
    assert cluster.wait_for(jobs[0]) == "FAILED"  # the next start finds the file
    assert [line["event"] for line in attempts(tmp_path / "run")] == ["begin", "end"]
    submit(script="0 100\n", code=2)


def test_scancel_is_the_end(submit: Submit, cluster: VirtualCluster, tmp_path: Path) -> None:
    (job,) = submit(script="wait 7\n0 100\n")["jobs"]
    wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
    cluster.ask("scancel", job)
    assert cluster.wait_for(job) == "CANCELLED"
    assert (tmp_path / "run" / "script").read_text() == "0 100\n"


@pytest.mark.slow
def test_a_job_killed_with_its_node_is_counted(submit: Submit, cluster: VirtualCluster, tmp_path: Path) -> None:
    """Slurm requeues it without asking the script, as it does when a node dies."""
    (job,) = submit("slurm.max_attempts_without_progress=2", script="wait -\nwait -\n0 100\n")["jobs"]
    for _ in range(2):
        wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
        (tmp_path / "run" / "waiting").unlink()
        cluster.ask("scontrol", "requeue", job)
        cluster.wait_for(job, "RUNNING", "FAILED")
    assert cluster.wait_for(job) == "FAILED"
    assert [line["restart"] for line in attempts(tmp_path / "run") if line["event"] == "begin"] == [0, 1]


@pytest.mark.slow
def test_every_run_of_a_sweep_comes_back_by_itself(submit: Submit, cluster: VirtualCluster, tmp_path: Path) -> None:
    """Two elements at once, one a node: the last one's number is also the whole array's."""
    runs = {"low rate": 1e-5, "it's $(high)": 1e-3}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({name: [f"optimizer.lr={lr}"] for name, lr in runs.items()}))
    for name in runs:
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "script").write_text("3 10\n3 20\n0 100\n")
    (job,) = submit("--sweep", "sweep.yaml", "--nodes", "1", "--max-running", "2")["jobs"]
    for element in (f"{job}_0", f"{job}_1"):
        assert cluster.wait_for(element) == "COMPLETED"
    for name, lr in runs.items():
        assert decisions(tmp_path / "run" / name) == [("requeue", 3), ("requeue", 3), ("done", 0)]
        begun = [line for line in attempts(tmp_path / "run" / name) if line["event"] == "begin"]
        assert [line["restart"] for line in begun] == [0, 1, 2], "no element requeues another"
        (config,) = (tmp_path / "run" / name / "slurm").glob("*-train.yaml")
        assert yaml.safe_load(config.read_text())["optimizer"]["lr"] == lr


@pytest.mark.slow
def test_torchrun_is_started_on_every_node_and_its_ranks_are_told(
    submit: Submit, cluster: VirtualCluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (job,) = submit("slurm.launcher=torchrun", "slurm.ranks_per_node=2")["jobs"]
    for node in (0, 1):
        wait_until((run / f"waiting-{node}").exists, f"the ranks of node {node}")
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job) == "COMPLETED"
    assert decisions(run) == [("requeue", 3), ("done", 0)]
    for node in (0, 1):
        assert (run / f"told-{node}").exists(), "SIGUSR1 reached the ranks"
        words = (run / f"torchrun-{node}").read_text().splitlines()
        assert {f"--node-rank={node}", "--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1"} < set(words)
        assert words[-4:-1] == ["-m", "megatron_xmtf", "train"]


def test_slurm_is_asked_before(submit: Submit, cluster: VirtualCluster) -> None:
    for words, text in (
        (["--nodes", "4"], "4 nodes asked for, the partition has 3"),
        (["slurm.partition=gpu"], "there is no partition gpu"),
        (["--time", "2-00:00:00"], "more than the partition's 1-00:00:00"),
        (["slurm.constraint=a100"], "Invalid feature specification"),
    ):
        told = submit(*words, code=2)
        assert told["jobs"] == []
        assert text in " ".join(finding["text"] for finding in told["findings"] if finding["level"] == "error")
    assert any(
        finding["topic"] == "slurm" and "to start at" in finding["text"] for finding in submit("--dry-run")["findings"]
    )
