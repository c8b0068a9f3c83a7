"""TensorBoard and Weights & Biases for real (offline): what their own readers find, over a resumed run."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.config.schema import LoggingConfig, WandbConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.launch import train
from megatron_xmtf.training.trackers import TensorBoard, WeightsAndBiases, check_trackers

OFFLINE = WandbConfig(project="multilingual", mode="offline", group="seeds", tags=["bloom", "test"])


@pytest.mark.parametrize(("package", "value"), [("tensorboard", True), ("wandb", {"project": "p"})])
def test_an_absent_package_is_named_with_its_remedy(package: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    check_trackers(LoggingConfig())
    with pytest.raises(ConfigError, match=rf"logging\.{package} is set, .* `pip install {package}`"):
        check_trackers(LoggingConfig(**{package: value}))


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """Read event files with TensorBoard's own reader: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory))
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


BLOCK = 32768


def wandb_records(path: Path) -> Iterator[bytes]:
    """Read a .wandb file: LevelDB's log format behind a file header of 7 bytes.

    Blocks of 32 KiB hold chunks (crc uint32, length uint16, type uint8: 1 whole, 2 first, 3 middle, 4 last part).
    """
    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # too little for a chunk: padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def offline_records(directory: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Return what an offline run holds: run id, what is said of the run, and every logged line."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("*.wandb")
    lines: list[dict[str, Any]] = []
    run_id, about = "", {}
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            about = {"project": record.run.project, "group": record.run.run_group, "tags": list(record.run.tags)}
            about["name"] = record.run.display_name
            about["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            lines.append({key: value for key, value in line.items() if not key.startswith("_")})
        elif kind == "exit":
            about["exit_code"] = record.exit.exit_code
    return run_id, about, lines


@pytest.fixture
def wandb() -> Any:
    return pytest.importorskip("wandb")


def test_tensorboard_hides_what_is_trained_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for resumed_step, steps, loss in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        board = TensorBoard(tmp_path, resumed_step=resumed_step)
        for step in steps:
            board.record({"step": step, "loss": loss, "mfu_percent": None, "skipped": False})
        board.close()
    assert scalars(tmp_path) == {
        "loss": {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0},
        "skipped": {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0},
    }


def rank_run_ids(output: Path) -> list[str]:
    """Open and close three runs in one rank: W&B's threads must not stay in the process that forks other ranks."""
    ids = []
    for project in ("first", "first", "second"):
        run = WeightsAndBiases(OFFLINE.model_copy(update={"project": project}), output=output, run_config={})
        ids.append(run.run_id)
        run.close(failed=project == "second")
    return ids


def test_another_project_is_another_run(tmp_path: Path, wandb: Any) -> None:
    (ids,) = run_ranks(rank_run_ids, world_size=1, arguments=(tmp_path,))
    assert ids[0] == ids[1] != ids[2]
    codes = [offline_records(path)[1]["exit_code"] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert sorted(codes) == [0, 0, 1]


def rank_opens_online(output: Path) -> None:
    WeightsAndBiases(OFFLINE.model_copy(update={"mode": "online"}), output=output, run_config={})


def test_online_without_a_login_is_refused(tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"'multilingual'.*`wandb login`, or set logging\.wandb\.mode=offline"):
        run_ranks(rank_opens_online, world_size=1, arguments=(tmp_path,))
    assert not (tmp_path / "wandb.json").exists()


def test_a_resumed_run_goes_on_in_both(
    run_config: Callable[..., RunConfig], tiny_pairs: Path, tmp_path: Path, wandb: Any
) -> None:
    """Four steps, then four more, each part in two pipeline stages."""
    pytest.importorskip("tensorboard")
    sections: dict[str, Any] = {
        "parallel": {"pipeline_model_parallel_size": 2},
        "data": {"train": [{"prefix": str(tiny_pairs)}], "validation": [{"prefix": str(tiny_pairs), "name": "held"}]},
        "evaluation": {"interval": 2, "rows": 4},
        "logging": {"log_interval": 2, "tensorboard": True, "wandb": OFFLINE.model_dump()},
    }
    for steps in (4, 8):
        train(run_config(schedule={"train_steps": steps}, **sections), nproc=2)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))

    board = scalars(run / "tensorboard")
    for key in ("loss", "grad_norm", "train_loss/tiny/en", "loss/held/fr"):
        wanted = {line["step"]: pytest.approx(line[key], rel=1e-6) for line in lines if key in line}
        assert board[key] == wanted, key
    assert len(board["loss/held/fr"]) == 4

    parts = [offline_records(path) for path in (run / "wandb").glob("offline-run-*")]
    assert len(parts) == 2, "rank 0 alone, once for each part"
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    for found, about, _ in parts:
        assert found == run_id
        assert (about["project"], about["group"], about["tags"]) == ("multilingual", "seeds", ["bloom", "test"])
        assert about["name"] == "run"
        assert about["exit_code"] == 0
        assert about["config"]["batch"]["global_batch_size"] == 8
    logged = sorted((line for _, _, part in parts for line in part), key=lambda line: line["step"])
    assert logged == [{key: value for key, value in line.items() if value is not None} for line in lines]
