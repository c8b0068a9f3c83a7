"""Every file operation of a save fails, writes short or kills in turn: the checkpoint before is whole, or the new one.

The faults are made below Python, in libc, so that what torch writes natively meets them too; see `faulty_files.c`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.training.prepare import prepare_run

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the library that makes the faults")


def drill(tmp_path: Path, run_config: Callable[..., RunConfig], *, stride: int) -> dict[str, Any]:
    """Fault every `stride`-th operation in every mode, in a process with the library preloaded."""
    library = tmp_path / "faulty_files.so"
    source = Path(__file__).with_name("faulty_files.c")
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    (tmp_path / "control").write_bytes(bytes(32))
    prepared = prepare_run(run_config(), world_size=1)
    (tmp_path / "prepared.pickle").write_bytes(pickle.dumps(prepared))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "XMTF_FAULT_CONTROL": str(tmp_path / "control"),
        "XMTF_FAULT_ROOT": str(tmp_path / "faulted"),
    }
    command = [sys.executable, "-m", "tests.faults.save_drill", str(tmp_path / "prepared.pickle"), str(stride)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(result: dict[str, Any]) -> None:
    assert result["problems"] == []
    assert result["operations"] > 30, "the library sees the operations of a save"
    assert result["tensors_that_differ_between_a_and_b"] > 30, "A and B can be told apart"
    outcomes = result["outcomes"]
    assert set(outcomes["short write"]) == {"saved"}, "what the system writes short is written on"
    for mode in ("fail once", "fail forever"):
        assert set(outcomes[mode]) <= {"saved", "DiskFullError", "CheckpointWriteError"}
        assert outcomes[mode].keys() - {"saved"}, "a failing operation is an error"
    assert "killed" in outcomes["kill"] or "CheckpointWriteError" in outcomes["kill"]


def test_some_operations_of_a_save_are_faulted(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    result = drill(tmp_path, run_config, stride=61)
    check(result)


@pytest.mark.slow
def test_every_operation_of_a_save_is_faulted(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    result = drill(tmp_path, run_config, stride=1)
    check(result)
    assert result["trials"] == 4 * result["operations"]
    assert result["outcomes"]["kill"].get("killed", 0) > 10, "the rank itself is killed too"
    print(json.dumps(result["outcomes"], indent=2))
