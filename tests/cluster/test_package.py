"""The job scripts' templates travel with the package: a wheel finds them inside, a checkout beside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_xmtf.cluster.render import templates_directory

ROOT = Path(__file__).parents[2]
RENDER = """
from pathlib import Path
from megatron_xmtf.cluster.render import render_commands, templates_directory
from megatron_xmtf.config.slurm import SlurmConfig
print(templates_directory())
print(render_commands([["doctor"]], slurm=SlurmConfig(), job_name="j", working_directory=Path("/w")))
"""


def test_a_checkout_has_them_at_its_top() -> None:
    assert templates_directory() == ROOT / "slurm"


def test_an_installed_wheel_renders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megatron_xmtf", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*build, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip to build a wheel with")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    shipped = sorted(path.name for path in (installed / "megatron_xmtf" / "slurm").iterdir())
    assert shipped == sorted(path.name for path in (ROOT / "slurm").iterdir())
    run = subprocess.run(
        [sys.executable, "-c", RENDER], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(installed / "megatron_xmtf" / "slurm"))
    assert "-m megatron_xmtf" in run.stdout
