"""kill -9 at random moments of a run of two ranks: the same command ends with the curve and weights of no kill."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from tests.faults.fault_control import ROOT

SECTIONS: dict[str, Any] = {
    "schedule": {"train_steps": 12, "lr_decay_style": "linear", "lr_warmup_steps": 2},
    "checkpoint": {"save_interval": 2, "keep_last": 2},
    # Masks are drawn at each step: an RNG state that is lost shows in the curve.
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "parallel": {"use_distributed_optimizer": True},
}


def drill(run_config: Callable[..., RunConfig], directory: Path, *, trials: int, seed: str) -> dict[str, Any]:
    (directory / "config.pickle").write_bytes(pickle.dumps(run_config(**SECTIONS)))
    words = [str(directory / "config.pickle"), str(directory), str(trials), seed]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_drill", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_run_is_killed(
    run_config: Callable[..., RunConfig], directory: Path, record_property: Callable[[str, Any], None]
) -> None:
    result = drill(run_config, directory, trials=1, seed="0")
    record_property("drill", {"what": "kill -9 at a random moment of a run", **result})
    assert result["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_two_hundred_runs_are_killed(
    part: int, run_config: Callable[..., RunConfig], directory: Path, record_property: Callable[[str, Any], None]
) -> None:
    seed = f"{os.environ.get('XMTF_DRILL_SEED', '1')}-{part}"
    result = drill(run_config, directory, trials=50, seed=seed)
    record_property("drill", {"what": f"kill -9 at random moments of a run, part {part + 1} of 4", **result})
    assert result["problems"] == []
    # Two steps between saves, one of which may still be written when the next begins.
    assert result["most_steps_again"] <= 4
