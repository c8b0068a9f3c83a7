"""benchmarks/gpu.py runs whole at toy sizes: every part ends, every bound holds, results are written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu_*.json")
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert not [name for name, part in parts.items() if "error" in part or not part["rows"]]
    checked = {row["kernel"].split(",")[0] for row in parts["checks"]["rows"]}
    assert checked == {"packed attention", "relative attention", "head and loss", "bias"}
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# cpu")


def test_it_refuses_to_measure_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        ("raise ValueError('of shape')", "exit code 1: ValueError: of shape"),
        # What it starts itself outlives it, and holds its output open.
        ("import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)", "ended after"),
    ],
    ids=["fails", "hangs"],
)
def test_a_part_that_fails_or_hangs_keeps_its_rows(
    ending: str, error: str, tmp_path: Path, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(gpu, "PARTS", {"checks": ("broken", 2)})
    words = """print('{"row": {"note": "Seed 1."}}'); print('{"row": {"ms": 1.5}}', flush=True); print('half')"""
    (tmp_path / "broken.py").write_text(f"{words}\n{ending}\n", encoding="utf-8")
    began = time.monotonic()
    part = gpu.run_part("checks", smoke=False, interprets=False, ends=began + 100)
    assert part["rows"] == [{"ms": 1.5}] and part["note"] == "Seed 1."
    assert part["error"].startswith(error) and time.monotonic() - began < 50
    late = gpu.run_part("checks", smoke=False, interprets=False, ends=time.monotonic() + 5)
    assert late["error"].startswith("not started") and late["rows"] == []


def test_a_model_is_given_back_before_the_next_is_built(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = load("gpu_steps")
    held: list[weakref.ref[torch.nn.Module]] = []
    at_release: list[bool] = []
    monkeypatch.setattr(steps, "release", lambda: at_release.append(held[-1]() is not None))

    def build(*, fits: bool) -> Callable[[], float]:
        model = torch.nn.Linear(2, 2)
        held.append(weakref.ref(model))

        def one_step() -> float:
            if not fits:
                raise torch.OutOfMemoryError("of the test")
            return float(model.weight.detach().sum())

        return one_step

    architecture = steps.BloomArchitecture(hidden_size=8, num_layers=1, num_attention_heads=1, vocab_size=16)
    batches = steps.draw_batches(1, 16, 16, smoke=True)
    assert steps.measure(architecture, batches, lambda: build(fits=False)) == {"remark": "out of memory"}
    assert steps.measure(architecture, batches, lambda: build(fits=True))["tokens/s"] > 0
    assert at_release == [False, False]


def test_the_best_cut_is_one_that_runs_and_is_right(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    module = load("gpu_blocks")
    exact = [torch.ones(3), torch.ones(3)]
    # By warps: the chosen cut, a slow one, a fast one, the fastest, which is wrong, and one that does not start.
    seconds = {8: 3.0, 1: 4.0, 2: 2.0, 16: 1.0}

    class Stub:
        expected = exact

        def run(self, cuts: Any) -> Any:
            (cut,) = cuts.values()
            if cut.num_warps == 32:
                raise RuntimeError("out of resource: shared memory")
            found = [torch.zeros(3), torch.ones(3)] if cut.num_warps == 16 else exact
            return found, lambda: cut.num_warps, lambda: 0

    monkeypatch.setattr(module.timing, "milliseconds", lambda function: seconds[function()])
    candidates = [(128, 64, warps, 3) for warps in (8, 1, 2, 16, 32)]
    monkeypatch.setattr(module.timing, "HALF", torch.bfloat16)
    rows, late = module.measured("attention_forward", 128, candidates, [Stub()], ends=time.monotonic() + 60)
    assert [row["warps"] for row in rows] == [8, 1, 2, 16, 32] and late == 0, "the chosen one is tried once"
    assert [row.get("best") for row in rows] == [None, None, True, None, None]
    assert [row.get("holds") for row in rows] == [True, True, True, False, None]
    assert rows[2]["speed, times the chosen's"] == 1.5 and "shared memory" in rows[4]["remark"]
    rows, late = module.measured("attention_forward", 128, candidates, [Stub()], ends=time.monotonic() - 1)
    assert len(rows) == 1 and rows[0]["chosen"] and late == 4


def test_goals_are_set_beside_what_was_found(load: Callable[[str], Any]) -> None:
    rows = {"model": "7b1", "rows": "one segment"}
    parts = {
        "step 3b": [
            {"side": "ours", "remark": "out of memory"},
            {"side": "ours", "step ms": 1.0, "tokens/s": 400.0, "MFU %": 49.0},
            {"side": "transformers", "step ms": 1.0, "tokens/s": 100.0, "MFU %": 10.0},
        ],
        "attention": [
            {**rows, "side": "fused", "both ms": 1.2},
            {**rows, "side": "flash SDPA, no ALiBi", "both ms": 1.0},
            {**rows, "side": "FlexAttention", "both ms": 1.1},
            {**rows, "side": "flash-attn varlen", "remark": "not installed"},
        ],
        "head": [{"side": "fused", "GiB": 1.0}, {"side": "plain", "GiB": 11.0}],
    }
    found = [(row["what"], round(row["found"], 2), row["met"]) for row in load("gpu_report").compare_with_goals(parts)]
    assert found == [
        ("MFU %", 49.0, False),
        ("tokens/s, times transformers", 4.0, True),
        ("speed, times flash SDPA, no ALiBi", 0.83, True),
        ("speed, times FlexAttention", 0.92, False),
        ("memory, times less than plain", 11.0, True),
    ]


@pytest.mark.parametrize(("fault", "holds"), [("none", True), ("all a little", False), ("one element", False)])
def test_the_2x_rule_sees_small_and_rare_errors(fault: str, holds: bool, load: Callable[[str], Any]) -> None:
    timing = load("gpu_timing")
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100_000, generator=generator, dtype=torch.float64)
    plain, ours = exact.bfloat16(), exact.bfloat16()
    if fault == "all a little":
        ours = (exact * 1.01).bfloat16()
    elif fault == "one element":
        ours[17] += 0.25
    assert timing.error_row("kernel", "output", ours, plain, exact)["holds"] is holds
    ours[3] = float("nan")
    assert timing.error_row("kernel", "output", ours, plain, exact)["holds"] is False
