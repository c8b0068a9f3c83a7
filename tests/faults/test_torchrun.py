"""Ranks that torchrun has started: who raises, dies or is asked to stop, and what the run directory says of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.checkpoint.directory import list_checkpoints
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ExitCode
from tests.checkpoint.test_sharded import read_metrics
from tests.faults.fault_control import ROOT

STEPS = 6
LONGEST = 300
"""Seconds; a rank that waits for a dead one for ever would take longer."""

pytestmark = pytest.mark.slow


@pytest.fixture
def launch(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[[str], Any]:
    """Run two ranks under torchrun, one of which does something; return the run directory, exit code and words."""
    config = run_config(schedule={"train_steps": STEPS, "lr_decay_style": "linear"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), "utf-8")

    def start(deed: str) -> Any:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "tests.faults.torchrun_rank", "train", str(tmp_path / "run.yaml")]
        environment = {**os.environ, "XMTF_DEED": deed}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST, start_new_session=True
        )
        return Path(config.output), done.returncode, done.stderr

    return start


def status(output: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((output / "status.json").read_text(encoding="utf-8"))
    return value


def test_a_rank_that_raises_is_named_with_host_step_and_phase(launch: Callable[[str], Any]) -> None:
    output, code, said = launch("raises")
    assert code == 1
    found = status(output)
    assert found["exit_code"] == ExitCode.FAILED
    place = f"(rank 1 on {socket.gethostname()}, step 3, forward and backward)"
    assert f"ZeroDivisionError: by hand {place}" in found["message"]
    assert "in deed" in said, "the stack of the rank with the cause"


def test_a_rank_that_dies_ends_the_job_and_is_named_by_torchrun(launch: Callable[[str], Any]) -> None:
    output, code, said = launch("killed")
    assert code != 0
    assert "local_rank: 1" in said and "-9" in said
    assert not list((output / "checkpoints").glob("*")) if (output / "checkpoints").exists() else True
    again, code, said = launch("none")
    assert code == 0, said[-2000:]
    assert sorted(read_metrics(again)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("deed", ["SIGTERM to torchrun", "SIGUSR1 to one rank"])
def test_a_signal_leads_to_a_checkpoint_and_the_code_to_start_again(deed: str, launch: Callable[[str], Any]) -> None:
    output, code, said = launch(deed)
    assert code != 0, "torchrun collapses the ranks' 3 to its own code"
    found = status(output)
    name = signal.Signals[deed.split()[0]].name
    assert found["exit_code"] == ExitCode.REQUEUE and name in found["message"], said[-2000:]
    (step, _) = list_checkpoints(output)[-1]
    assert step == max(read_metrics(output)) < STEPS
    output, code, said = launch("none")
    assert code == 0, said[-2000:]
    assert sorted(read_metrics(output)) == list(range(1, STEPS + 1)) and status(output)["exit_code"] == 0
