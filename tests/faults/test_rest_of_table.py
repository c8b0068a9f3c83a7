"""Rows of the fault table that no other test holds; docs/reliability.md has the whole table."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import random
import shutil
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.checkpoint.directory import step_directory
from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.cli import main
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ConfigError, CorruptCheckpointError, RankFailedError
from megatron_xmtf.parallel.topology import rendezvous_store
from megatron_xmtf.training.launch import train
from tests.faults.fault_control import ROOT

FLIPS = 20
TOKEN = "hf_drillSecretTokenThatMustNotBeWritten"


def inspect(path: Path) -> tuple[int, str]:
    """Look deep; return exit code and message."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = main(["inspect", str(path), "--deep"])
    return code, err.getvalue()


def test_every_flipped_byte_is_found_by_a_deep_look_and_its_file_named(
    tiny_pairs: Path, tiny_checkpoint: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    chance = random.Random(12)
    for path in tiny_pairs.parent.glob("tiny[_.]*"):
        shutil.copy(path, tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    files = {
        **{path: tmp_path / "tiny" for path in tmp_path.glob("tiny_*") if path.suffix in (".bin", ".idx", ".npz")},
        **{
            path: tmp_path / "checkpoint"
            for path in (tmp_path / "checkpoint").rglob("*")
            if path.is_file() and path.name != "manifest.json"
        },
    }
    assert inspect(tmp_path / "tiny")[0] == inspect(tmp_path / "checkpoint")[0] == 0
    missed = []
    for path, whole in files.items():
        content = path.read_bytes()
        for place in [chance.randrange(len(content)) for _ in range(FLIPS)]:
            path.unlink()
            path.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
            )
            code, message = inspect(whole)
            if code not in (2, 5) or path.name not in message:
                missed.append((path.name, place, code, message))
        path.write_bytes(content)
    record_property("drill", {"what": "flipped bytes", "trials": FLIPS * len(files), "problems": missed})
    assert missed == [] and len(files) > 8


def test_a_shard_that_is_a_link_to_elsewhere_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (shard, *_) = (tmp_path / "checkpoint").glob("*.distcp")
    shard.rename(tmp_path / "elsewhere.distcp")
    shard.symlink_to(tmp_path / "elsewhere.distcp")
    with pytest.raises(CorruptCheckpointError, match="leads outside"):
        open_manifest(tmp_path / "checkpoint")


def test_no_source_lets_a_library_run_code_of_a_model() -> None:
    allowed = []
    for path in (ROOT / "megatron_xmtf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
                wanted = node.arg == "weights_only"
                if not isinstance(node.value, ast.Constant) or node.value.value is not wanted:
                    allowed.append(f"{path.name}:{node.value.lineno} {node.arg}")
    assert allowed == []


def test_secrets_of_the_environment_are_written_nowhere(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, TOKEN)
    config = run_config(schedule={"train_steps": 1})
    train(config, nproc=2)
    files = [path for path in Path(config.output).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set a launcher's variables, for rank 0 of 2."""

    def set_all(port: Any) -> None:
        values = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    return set_all


def test_a_port_that_is_taken_and_a_rank_that_does_not_come_are_told_in_time(launched: Callable[..., None]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        launched(taken.getsockname()[1])
        with pytest.raises(RankFailedError, match="MASTER_PORT"):
            rendezvous_store(timeout=timedelta(seconds=5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched(port)
    with pytest.raises(RankFailedError, match="did not come"):
        rendezvous_store(timeout=timedelta(seconds=2))
    launched("no number")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        rendezvous_store(timeout=timedelta(seconds=2))


def test_other_versions_on_resume_are_said(
    run_config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(schedule={"train_steps": 2}, checkpoint={"save_interval": 1})
    train(run_config(schedule={"train_steps": 2}, checkpoint={"save_interval": 1}), nproc=1)
    newest = step_directory(Path(config.output) / "checkpoints", 2)
    manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    manifest["versions"]["torch"] = "1.0.0"
    (newest / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        train(config, nproc=1)
    version = torch.__version__.split("+")[0]
    assert f"other versions: torch: 1.0.0 -> {version}" in caplog.text
