"""The doctor tells what is there, what is missing and what that means; its exit code says whether a run can start."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cli import doctor, main
from megatron_xmtf.errors import ConfigError


@pytest.fixture
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the trial of local ranks out where it is not what is tested."""
    monkeypatch.setattr("megatron_xmtf.parallel.launch.run_ranks", lambda function, *, world_size: [3.0] * world_size)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def findings(capsys: pytest.CaptureFixture[str], expected_code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == expected_code
    return json.loads(capsys.readouterr().out)


def test_this_machine_can_start_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    found = findings(capsys)
    assert found["ready"] and found["problems"] == []
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "megatron-core", "transformers", "numpy"):
        assert found["required"][name]["installed"] == metadata.version(name)
    if not torch.cuda.is_available():
        assert found["device"]["kind"] == "cpu" and "CPU adapter" in found["device"]["engine"]
        assert found["ranks"] == {"started": 2, "backend": "gloo"}
    assert found["kernels"] == {
        "packed attention": {"fp32": "segments", "bf16": "segments"},
        "attention of encoder and decoder": {"fp32": "segments", "bf16": "segments"},
        "head and loss": {"fp32": "chunked", "bf16": "chunked"},
        "bias, dropout and residual": {"fp32": "reference", "bf16": "reference"},
        "activation": {"fp32": "torch", "bf16": "torch"},
        "adam": {"fp32": "torch"},
        "weight gradients": {"fp32": "torch"},
    }
    assert found["machine"]["cores"] <= (os.cpu_count() or 1)
    assert found["machine"]["memory_gib"] > 0 and found["machine"]["free_disk_gib"] > 0
    assert found["optional"].keys() == doctor.OPTIONAL.keys()


def test_the_printed_form_says_the_same(capsys: pytest.CaptureFixture[str], without_ranks: None) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "a run can start here"
    assert f"megatron-core       {metadata.version('megatron-core')}" in printed
    assert "packed attention  fp32: segments, bf16: segments" in printed
    assert "PROBLEM" not in printed


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        (None, "megatron-core is not installed; install it with `pip install 'megatron-core"),
        ("0.15.0", "megatron-core 0.15.0 is not "),
    ],
)
def test_a_missing_or_wrong_package_is_a_problem_with_its_remedy(
    installed: str | None,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: installed if name == "megatron-core" else real(name))
    found = findings(capsys, expected_code=1)
    assert not found["ready"]
    assert len(found["problems"]) == 1 and found["problems"][0].startswith(problem)
    assert found["kernels"] is None and found["ranks"] is None
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"PROBLEM   {problem}" in printed
    assert printed.splitlines()[-1] == "no run can start here before the problems are solved"


def test_a_package_that_is_not_installed_itself_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OWN_NAME", "no-such-package-of-ours")
    versions, problems = doctor.examine_required()
    assert versions == {} and "without being installed" in problems[0]


def test_ranks_that_cannot_meet_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_ranks: None
) -> None:
    def fail(function: Any, *, world_size: int) -> None:
        raise ConfigError("no network here")

    monkeypatch.setattr("megatron_xmtf.parallel.launch.run_ranks", fail)
    found = findings(capsys, expected_code=1)
    assert found["problems"] == ["2 local ranks could not work together: no network here"]
    assert found["kernels"] is not None


def test_a_wrong_sum_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_ranks: None
) -> None:
    monkeypatch.setattr("megatron_xmtf.parallel.launch.run_ranks", lambda function, *, world_size: [1.0, 2.0])
    assert findings(capsys, expected_code=1)["problems"] == ["2 local ranks added up their numbers to [1.0, 2.0]"]


def test_under_a_launcher_no_ranks_are_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = findings(capsys)
    assert found["ranks"] is None
    assert any("started by a launcher" in note for note in found["notes"])


def package(root: Path, name: str, *submodules: str) -> None:
    """Make a package that must not be imported."""
    for directory in (root / name, *(root / name / submodule for submodule in submodules)):
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("raise RuntimeError('the doctor imports no optional package')\n")


def test_the_unrelated_apex_is_told_from_that_of_nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path / "pypi", "apex", "scripts")
    package(tmp_path / "nvidia", "apex", "optimizers")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "pypi"))
        found = doctor.examine_optional("apex")
        assert found["installed"] is None and "not NVIDIA's" in str(found["remark"])
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "nvidia"))
        found = doctor.examine_optional("apex")
        assert found["installed"] == "version unknown" and found["remark"] is None


def test_an_optional_package_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path, "flash_attn")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.examine_optional("flash-attn")["installed"] == "version unknown"
    assert "flash_attn" not in sys.modules


def test_little_disk_is_worth_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_ranks: None
) -> None:
    monkeypatch.setattr(
        doctor, "examine_resources", lambda directory: {"cores": 1, "memory_gib": 1.0, "free_disk_gib": 0.5}
    )
    found = findings(capsys)
    assert any("0.5 GiB are free" in note for note in found["notes"])
