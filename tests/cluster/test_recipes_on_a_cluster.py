"""Every recipe is a job: its nodes hold its layout, its script is one, and its time and memory are planned."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.config.recipe import SHIPPED_OVERLAYS, SHIPPED_RECIPES
from tests.config.test_recipes import PUBLISHED

RECIPES = sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))
HOURS = {"bloomz-560m": "100", "bloomz-7b1": "100", "bloomz-176b": "100"}
"""Of one job, as published; 20 in the scripts of the other sizes."""


def given(recipe: str) -> list[str]:
    return ["data.mixture_root=d", *(["tokenizer=t"] if recipe == "alexatm-20b" else [])]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_at_its_real_size(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", recipe, "--dry-run", "--json", *given(recipe)]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    findings = {finding["topic"]: finding for finding in told["findings"]}
    config = load_config(recipe, [*given(recipe), "output=o", *([] if recipe == "alexatm-20b" else ["model=m"])])
    slurm = config.slurm
    assert findings["sizes"]["level"] == "ok"
    assert f"{slurm.nodes} nodes x 8 ranks = {slurm.world_size} = TP" in findings["sizes"]["text"]
    assert "hours planned" in findings["time"]["text"]
    assert "checkpoints of" in findings["disk"]["text"]
    assert told["jobs"] == []
    lines = told["script"].splitlines()
    assert f"#SBATCH --nodes={slurm.nodes}" in lines
    assert "#SBATCH --gres=gpu:8" in lines
    assert f"#SBATCH --time={slurm.time}" in lines
    assert subprocess.run(["bash", "-n"], input=told["script"], text=True).returncode == 0
    assert "slurm" in (SHIPPED_RECIPES / f"{recipe}.yaml").read_text().split("data:")[0], "where its numbers come from"


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_nodes_and_time_are_the_published_ones(recipe: str) -> None:
    slurm = load_config(recipe, [*given(recipe), "output=o", "model=m"]).slurm
    ranks = PUBLISHED[recipe][-1]
    assert (slurm.world_size, slurm.nodes, slurm.gpus_per_node) == (ranks, ranks // 8, 8)
    assert slurm.time == f"{HOURS.get(recipe, '20')}:00:00"
    assert slurm.signal_seconds == 600  # scripts: --exit-duration-in-mins, 10 minutes before the limit
    assert slurm.cpus_per_rank == 64 // 8


@pytest.mark.parametrize("overlay", sorted(path.stem for path in SHIPPED_OVERLAYS.glob("*.yaml")))
def test_a_toy_is_a_job_for_one_node_without_gpus(overlay: str) -> None:
    recipe = "mt0-xxl" if "encoder" in overlay else "bloomz-176b"
    slurm = load_config(recipe, [*given(recipe), "output=o", "model=m"], overlays=[overlay]).slurm
    assert (slurm.nodes, slurm.world_size, slurm.gpus_per_node) == (1, 2, 0)
