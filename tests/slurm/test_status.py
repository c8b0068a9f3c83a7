"""What `--status` says of jobs that the queue has forgotten, on a real Slurm with accounting and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cli import main
from tests.slurm.accounting import why_no_accounting
from tests.slurm.conftest import Submit
from tests.slurm.virtual_cluster import VirtualCluster, wait_until, why_not


@pytest.fixture(params=[True, False], ids=["accounting", "none"])
def cluster(request: pytest.FixtureRequest) -> Iterator[VirtualCluster]:
    """A cluster of this test's own whose queue forgets a job two seconds after its end."""
    reason = why_not() or (why_no_accounting() if request.param else None)
    if reason is not None:
        pytest.skip(reason)
    with VirtualCluster(has_accounting=request.param, remembers_seconds=2) as started:
        yield started


@pytest.mark.slow  # half a minute: two clusters, and queues that take ten seconds to forget
def test_jobs_that_the_queue_has_forgotten(
    submit: Submit, cluster: VirtualCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, code in ((10, 0), (20, 2)):
        directory = tmp_path / "run" / "checkpoints" / f"step_{step:07d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").touch()
        (directory / "code").write_text(f"{code}\n")
    asked = submit("--each-checkpoint", "--", "inspect", "{checkpoint}", "--show", "{step}")["jobs"][0]
    for element in (0, 1):
        wait_until((tmp_path / "run" / "slurm" / f"ended-{asked}_{element}").exists, "the verbs to end")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    done = submit(script="0 100\n")["jobs"][0]
    wait_until(lambda: not cluster.ask("squeue", "-h", "--states=all"), "the queue to forget")
    # One that was stopped by hand while it ran, and one while it waited.
    (tmp_path / "run" / "status.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    running = submit(script="wait 7\n")["jobs"][0]
    wait_until((tmp_path / "run" / "waiting").exists, "the ranks to run")
    waiting = submit("--after", running)["jobs"][0]
    cluster.ask("scancel", waiting)
    cluster.ask("scancel", running)
    wait_until(lambda: not cluster.ask("squeue", "-h", "--states=all"), "the queue to forget")
    capsys.readouterr()
    assert main(["submit", "--status", "run", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    found = {job["job"]: (job["state"], job["reason"], job["source"]) for job in told["jobs"]}
    if cluster.has_accounting:
        assert found == {
            asked: ("1 COMPLETED, 1 FAILED", "", "accounting"),
            done: ("COMPLETED", "exit 0:0 on n[1-2]", "accounting"),
            running: ("CANCELLED", "exit 0:0 on n[1-2]", "accounting"),
            waiting: ("CANCELLED", "exit 0:0 on None assigned", "accounting"),
        }
        assert told["unanswered"] == []
    else:
        assert found[asked] == ("1 COMPLETED, 1 FAILED", "", "notes")
        assert found[done] == ("COMPLETED", "code 0", "notes")
        assert found[running] == ("ENDED BY SLURM", "code 3", "notes")
        assert found[waiting][0::2] == ("unknown", None)
        assert told["unanswered"] == ["sacct: Slurm accounting storage is disabled"]
