"""One cluster for all tests of a session, and runs whose ranks do as they are told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.cli import main
from tests.slurm.virtual_cluster import VirtualCluster, why_not

STUB = Path(__file__).parent / "stub_python"
Submit = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[VirtualCluster]:
    """A running cluster; skips where none can be started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # What a job of another cluster has set must not reach this one.
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("SLURM", "SBATCH"))}
    try:
        with VirtualCluster() as started:
            yield started
    finally:
        os.environ.update(kept)


@pytest.fixture
def submit(
    cluster: VirtualCluster,
    tiny_checkpoint: Path,
    tiny_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Submit:
    """Submit a run whose ranks follow a script of (code, step); return what --json says."""
    monkeypatch.setenv("XMTF_TEST_PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)
    values = {
        "model": str(tiny_checkpoint),
        "output": str(tmp_path / "run"),
        "data": {"train": [{"prefix": str(tiny_pairs)}], "index_directory": str(tmp_path / "index")},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64},
        "schedule": {"train_steps": 100},
        "precision": "fp32",
        "slurm": {"nodes": 2, "ranks_per_node": 1, "signal_seconds": 30, "python": str(STUB)},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    assert main(["pack", "train.yaml"]) == 0
    capsys.readouterr()

    def put(*words: str, script: str = "", output: str = "run", code: int = 0) -> dict[str, Any]:
        (tmp_path / output).mkdir(exist_ok=True)
        (tmp_path / output / "script").write_text(script)
        verb = words.index("--") if "--" in words else len(words)
        assert main(["submit", "train.yaml", *words[:verb], "--json", *words[verb:]]) == code
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    return put
