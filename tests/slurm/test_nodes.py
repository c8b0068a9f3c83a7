"""Nodes that are lost, drained or wanted by others, on a real Slurm: the run goes on, on whatever nodes it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import Submit
from tests.slurm.test_requeue import attempts, decisions
from tests.slurm.virtual_cluster import VirtualCluster, wait_until


def take_all_nodes(cluster: VirtualCluster) -> str:
    """Submit a job that goes first and shares no node: it runs only when the run has left."""
    return cluster.ask("sbatch", "--parsable", "-phigh", "-N3", "--exclusive", "--output=/dev/null", "--wrap=true")


def begun(run: Path) -> list[tuple[int, int, str]]:
    return [(line["restart"], line["step"], line["nodes"]) for line in attempts(run) if line["event"] == "begin"]


def test_a_node_that_dies_is_replaced(submit: Submit, cluster: VirtualCluster, tmp_path: Path) -> None:
    """Slurm ends the job where it stands and requeues it; the script is not asked."""
    (job,) = submit(script="wait 40\n0 100\n")["jobs"]
    wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
    cluster.lose("n2")
    try:
        assert cluster.wait_for(job) == "COMPLETED"
    finally:
        cluster.bring_back("n2")
    assert begun(tmp_path / "run") == [(0, 0, "n[1-2]"), (1, 40, "n[1,3]")]
    assert decisions(tmp_path / "run")[-1] == ("done", 0)


@pytest.mark.parametrize(
    "partition",
    [
        pytest.param("low", id="PreemptMode=REQUEUE"),
        pytest.param("brief", id="PreemptMode=CANCEL", marks=pytest.mark.slow),
    ],
)
def test_a_preempted_run_saves_and_comes_back(
    partition: str, submit: Submit, cluster: VirtualCluster, tmp_path: Path
) -> None:
    """It saves within the partition's grace, and its script requeues it, also where Slurm would cancel it."""
    (job,) = submit(f"slurm.partition={partition}", script="wait 40\n0 100\n")["jobs"]
    wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
    urgent = take_all_nodes(cluster)
    assert cluster.wait_for(urgent) == "COMPLETED"
    assert cluster.wait_for(job) == "COMPLETED"
    assert decisions(tmp_path / "run") == [("requeue", 3), ("done", 0)]
    assert [(restart, step) for restart, step, _ in begun(tmp_path / "run")] == [(0, 0), (1, 40)]


@pytest.mark.slow
def test_a_run_that_does_not_save_within_the_grace_is_counted(
    submit: Submit, cluster: VirtualCluster, tmp_path: Path
) -> None:
    """Slurm kills ranks that do not hear, and requeues the job itself; it goes on from the checkpoint before."""
    cluster.ask("scontrol", "update", "partitionname=low", "gracetime=2")
    try:
        (job,) = submit(script="deaf 40\n0 100\n")["jobs"]
        wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
        urgent = take_all_nodes(cluster)
        assert cluster.wait_for(urgent) == "COMPLETED"
        assert cluster.wait_for(job) == "COMPLETED"
    finally:
        cluster.ask("scontrol", "update", "partitionname=low", "gracetime=300")
    assert [(restart, step) for restart, step, _ in begun(tmp_path / "run")] == [(0, 0), (1, 40)]
    assert decisions(tmp_path / "run")[-1] == ("done", 0)
    assert ("requeue", 3) not in decisions(tmp_path / "run")
