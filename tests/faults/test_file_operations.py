"""Every file operation of every writer fails, writes short or kills in turn, and nothing is lost.

The faults are made below Python, in libc, so that what libraries write natively meets them too; see `faulty_files.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.config import RunConfig
from megatron_xmtf.training.prepare import prepare_run
from tests.faults.fault_control import COMPILER, run_file_drill
from tests.tiny import write_records

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the library that makes the faults")

SUBJECTS = ("save", "preprocess", "pack", "export")
STRIDES = {"save": 73, "preprocess": 97}
"""Of the normal run: some operations of those with most of them."""


@pytest.fixture
def inputs_of(
    run_config: Callable[..., RunConfig], tiny_hf: Path, tiny_checkpoint: Path, tmp_path: Path
) -> Callable[[str], Any]:
    """What each subject of `file_drill` takes."""

    def make(subject: str) -> Any:
        config = run_config()
        if subject == "save":
            return prepare_run(config, world_size=1)
        if subject == "preprocess":
            write_records(tmp_path / "records.jsonl", 60)
            return tiny_hf, tmp_path / "records.jsonl"
        if subject == "pack":
            values = config.model_dump(mode="json", exclude_unset=True)
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
            return tmp_path / "run.yaml"
        return tiny_checkpoint

    return make


def check(result: dict[str, Any], *, complete: bool) -> None:
    assert result["problems"] == []
    assert result["operations"] >= 20, "the library sees the operations"
    outcomes = result["outcomes"]
    good = {"saved", "DONE"}
    assert set(outcomes["short write"]) <= good, "what the system writes short is written on"
    for mode in ("fail once", "fail forever"):
        assert set(outcomes[mode]) <= good | {"DISK_FULL", "FAILED", "DiskFullError", "CheckpointWriteError"}
    if complete:
        assert result["trials"] == 4 * result["operations"]
        assert outcomes["fail forever"].keys() - good, "failing operations are errors"
        assert outcomes["kill"]["killed"] > 10, "the process itself is killed too"


@pytest.mark.parametrize("subject", STRIDES)
def test_some_operations_are_faulted(
    subject: str, inputs_of: Callable[[str], Any], directory: Path, record_property: Callable[[str, Any], None]
) -> None:
    result = run_file_drill(subject, inputs_of(subject), directory, stride=STRIDES[subject])
    record_property("drill", {"what": f"{subject}: some file operations", **result})
    check(result, complete=False)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_operation_is_faulted(
    subject: str, inputs_of: Callable[[str], Any], directory: Path, record_property: Callable[[str, Any], None]
) -> None:
    result = run_file_drill(subject, inputs_of(subject), directory, stride=1)
    record_property("drill", {"what": f"{subject}: every file operation", **result})
    check(result, complete=True)
