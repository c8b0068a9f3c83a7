"""A real full disk under every writer: exit code 8, what was finished stays; with space the same command goes on."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ExitCode
from megatron_xmtf.training.launch import train
from tests.checkpoint.test_sharded import read_metrics
from tests.faults.fault_control import ROOT
from tests.tiny import write_records

pytestmark = pytest.mark.slow  # half a minute; test_sharded.py and test_resume.py have a limit met in the normal run

UNSHARE = ["unshare", "--mount", "--map-root-user"]
STEPS = 6


def may_mount(directory: Path) -> bool:
    """Whether this user may mount a file system in a name space of its own."""
    if shutil.which("unshare") is None:
        return False
    words = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def seen(
    tiny_hf: Path, tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What full_disk_drill.py saw, and the losses of a run with space."""
    from tests.conftest import make_run_config

    directory = tmp_path_factory.mktemp("full")
    if not may_mount(directory):
        pytest.skip("this user may not mount a file system in a name space of its own")
    make: Callable[..., RunConfig] = make_run_config(tiny_checkpoint, tiny_pairs, directory)
    config = make(schedule={"train_steps": STEPS}, checkpoint={"save_interval": 1, "keep_last": 2})
    assert train(config, nproc=2)["exit_code"] == 0
    write_records(directory / "records.jsonl", 4000)
    values = config.model_dump(mode="json", exclude_unset=True)
    (directory / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    inputs = {
        "hf": str(tiny_hf),
        "checkpoint": str(tiny_checkpoint),
        "records": str(directory / "records.jsonl"),
        "config": str(directory / "run.yaml"),
    }
    (directory / "inputs.pickle").write_bytes(pickle.dumps(inputs))
    (directory / "disk").mkdir()
    words = [sys.executable, "-m", "tests.faults.full_disk_drill", directory / "inputs.pickle", directory / "disk"]
    done = subprocess.run([*UNSHARE, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    undisturbed = {step: line["loss"] for step, line in read_metrics(Path(config.output)).items()}
    return {**json.loads(done.stdout.splitlines()[-1]), "undisturbed": undisturbed}


def check_refusal(full: dict[str, Any]) -> None:
    assert full["code"] == ExitCode.DISK_FULL, full["said"][-2000:]
    assert "Traceback" not in full["said"]


@pytest.mark.parametrize("name", ["preprocess", "pack", "export"])
def test_a_verb_leaves_nothing_and_its_second_attempt_the_undisturbed_bytes(
    name: str, seen: dict[str, Any], record_property: Callable[[str, Any], None]
) -> None:
    found = seen[name]
    check_refusal(found["full"])
    assert found["left"] == []
    assert found["again"]["code"] == found["undisturbed"] == 0, found["again"]["said"][-2000:]
    assert found["same"]
    record_property("drill", {"what": f"{name} on a full file system", "trials": 1, "problems": []})


@pytest.mark.parametrize(("name", "kept"), [("save, checked before", []), ("save", [1, 2]), ("metrics.jsonl", [2])])
def test_a_run_keeps_its_checkpoints_and_goes_on(
    name: str, kept: list[int], seen: dict[str, Any], record_property: Callable[[str, Any], None]
) -> None:
    found = seen[name]
    check_refusal(found["full"])
    if name != "metrics.jsonl":  # there not a page is left, for the status either
        assert found["status"]["exit_code"] == ExitCode.DISK_FULL
    assert found["steps"] == kept
    if name == "metrics.jsonl":
        assert "metrics.jsonl: 0.00 GiB free" in found["full"]["said"], found["full"]["said"][-2000:]
    assert found["again"]["code"] == 0, found["again"]["said"][-2000:]
    assert {int(step): loss for step, loss in found["losses"].items()} == seen["undisturbed"]
    assert found["left"] == []
    record_property("drill", {"what": f"{name}: a full file system", "trials": 1, "problems": []})
