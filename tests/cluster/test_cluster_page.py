"""The commands and the configuration of docs/cluster.md are ones that `xmtf submit` takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_xmtf.cli import main
from megatron_xmtf.config import config_from_mapping
from megatron_xmtf.config.slurm import SlurmConfig

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


def test_the_configuration_is_one() -> None:
    config_from_mapping(yaml.safe_load(block("yaml"))["slurm"], SlurmConfig, source="docs/cluster.md")
    container = yaml.safe_load(block("yaml container"))["slurm"]
    config_from_mapping(container, SlurmConfig, source="docs/cluster.md")
    assert set(re.findall(r"`slurm\.(\w+)", PAGE)) <= set(SlurmConfig.model_fields)


def test_each_command_of_the_walk(
    run_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm: the scripts are printed
    values = run_config(model="checkpoints/bloom", output="runs/first").model_dump(mode="json")
    values["batch"]["global_batch_size"] = 64  # 4 nodes x 8 ranks, 2 rows each
    Path("train.yaml").write_text(yaml.safe_dump(values))
    Path("cluster.yaml").write_text(block("yaml"))
    Path("models/bloom").mkdir(parents=True)
    Path("records.jsonl").touch()
    function, *lines = block("bash test").splitlines()
    (words,) = re.findall(r"submit\(\) \{ xmtf (.*?) --parsable \"\$@\"; \}", function)
    for line in lines:
        (command,) = re.findall(r"submit (.*?)\)?$", line)
        rest = shlex.split(re.sub(r"\$\w+", "12", command))
        assert main([*shlex.split(words), "--dry-run", *rest]) == 0, line
        printed = capsys.readouterr().out
        assert printed.startswith("#!/bin/bash\n")
        assert "--" not in rest or f"command=({rest[rest.index('--') + 1]} " in printed


def test_commands_in_the_tables_parse(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_xmtf.cli import parse

    commands = re.findall(r"`(xmtf submit [^`]*)`", PAGE)
    assert len(commands) > 5
    for command in commands:
        parse(shlex.split(command.replace("OUT", "runs/first"))[1:])
