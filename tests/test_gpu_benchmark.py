"""benchmarks/gpu.py runs whole at toy sizes: every part ends, every bound holds, results are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu_*.json")
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert not [name for name, part in parts.items() if "error" in part]
    checked = {row["kernel"].split(",")[0] for row in parts["checks"]["rows"]}
    assert checked == {"packed attention", "relative attention", "head and loss"}
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# cpu")


def test_it_refuses_to_measure_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())
