"""What a script is submitted with, by an sbatch that notes its variables; tests/slurm has the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_xmtf.cluster.attempts import read_lines
from megatron_xmtf.cluster.checks import check_script
from megatron_xmtf.cluster.shell import quote
from megatron_xmtf.cluster.submission import after_all, submit
from megatron_xmtf.config.slurm import SlurmConfig
from megatron_xmtf.errors import ConfigError


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand an sbatch and a sinfo in the path; return the directory where sbatch leaves `words` and `variables`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    where = quote(str(directory))
    lines = {
        "sbatch": f"printf '%s\\n' \"$@\" >> {where}/words; export -p > {where}/variables; echo '41;cluster'",
        "sinfo": "echo 'gpu*|4|1-00:00:00'",
    }
    for name, line in lines.items():
        (directory / name).write_text(f"#!/bin/bash\n{line}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def test_variables_of_the_job_that_submits_stay_there(
    noted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaking = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64", "SLURM_RESTART_COUNT": "3", "SLURM_ARRAY_JOB_ID": "6"}
    for name, value in {**leaking, "SLURM_CONF": "/etc/slurm.conf", "MINE": "it's"}.items():
        monkeypatch.setenv(name, value)
    submit("#!/bin/bash\n", directory=tmp_path / "-o slurm", submission="s", kind="train", output=tmp_path)
    handed_on = (noted / "variables").read_text()
    assert "SLURM_CONF" in handed_on and "MINE" in handed_on
    assert not [name for name in leaking if f" {name}=" in handed_on]


def test_notes_of_a_chain_and_of_a_sweep(noted: Path, tmp_path: Path) -> None:
    common = {"submission": "s", "kind": "train"}
    chain = submit("#!/bin/bash\n", directory=tmp_path / "a" / "slurm", output=tmp_path / "a", links=2, **common)
    assert (chain.jobs, chain.wait_for) == (["41", "41"], "41?41")
    words = (noted / "words").read_text().splitlines()
    assert words == [
        *("--parsable", "s-train.sbatch", "1", "2"),
        *("--parsable", "--dependency=afternotok:41", "--kill-on-invalid-dep=yes", "s-train.sbatch", "2", "2"),
    ]
    runs = [tmp_path / "b" / name for name in ("it's", "$(two)")]
    submit("#!/bin/bash\n", directory=tmp_path / "b" / "slurm", output=tmp_path / "b", elements=runs, **common)
    (base,) = read_lines(tmp_path / "b" / "slurm" / "jobs.jsonl")
    assert (base["job"], base["runs"]) == ("41", list(map(str, runs)))
    assert [read_lines(run / "slurm" / "jobs.jsonl")[0]["job"] for run in runs] == ["41_0", "41_1"]


def test_variables_that_go_before_the_script_are_told(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.level for finding in check_script("#!/bin/bash\n", SlurmConfig(), nodes=1, is_dry=True)] == ["ok"]
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    *_, told = check_script("#!/bin/bash\n", SlurmConfig(), nodes=1, is_dry=True)
    assert told.level == "warning" and told.text.startswith("SBATCH_PARTITION of this shell goes before")


@pytest.mark.parametrize(
    ("words", "dependency"),
    [([], None), (["12", "14"], "afterok:12:14"), (["15?16"], "afterok:15?afterok:16")],
)
def test_dependencies_in_slurms_words(words: list[str], dependency: str | None) -> None:
    assert after_all(words) == dependency


@pytest.mark.parametrize("words", [["12;13"], ["-1"], ["12_3"], [""], ["1?2", "3"]])
def test_a_dependency_that_slurm_cannot_have(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--after"):
        after_all(words)
