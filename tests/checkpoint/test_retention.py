"""Old checkpoints go by rule; what is not a finished checkpoint of ours stays or never counts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from megatron_xmtf.checkpoint.directory import list_checkpoints, step_directory
from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, begin_checkpoint, finish_checkpoint
from megatron_xmtf.checkpoint.retention import prune_checkpoints
from megatron_xmtf.config.running import KeepBestConfig


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    for step in range(10, 80, 10):
        directory = step_directory(root, step)
        directory.mkdir(parents=True)
        (directory / "__0_0.distcp").write_bytes(b"weights")
        (directory / MANIFEST_NAME).write_text("{}")
    return root


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def test_the_last_ones_are_kept(checkpoints: Path) -> None:
    assert prune_checkpoints(checkpoints, keep_last=2, keep_every=None) == [10, 20, 30, 40, 50]
    assert steps(checkpoints) == [60, 70]


def test_multiples_are_kept_as_well(checkpoints: Path) -> None:
    assert prune_checkpoints(checkpoints, keep_last=2, keep_every=20) == [10, 30, 50]
    assert steps(checkpoints) == [20, 40, 60, 70]


def measured(root: Path, losses: dict[int, float | None]) -> Path:
    """Write checkpoints whose manifests hold a validation loss each."""
    for step, loss in losses.items():
        path = step_directory(root, step)
        fields = {"architecture": {}, "dtype": "float32", "config": None, "consumed_rows": 0, "contents": ["model"]}
        metrics = {} if loss is None else {"loss/a": loss}
        finish_checkpoint(begin_checkpoint(path), path, step=step, metrics=metrics, **fields)
    return root


@pytest.mark.parametrize(
    ("mode", "losses", "best"),
    [
        ("min", {10: 2.0, 20: 1.0, 30: 3.0, 40: 1.5, 50: 1.6}, 20),
        ("max", {10: 2.0, 20: 1.0, 30: 3.0, 40: 1.5, 50: 1.6}, 30),
        ("min", {10: 1.0, 20: 1.0, 30: 3.0, 40: 3.0, 50: 3.0}, 20),  # the newest of equals
        ("min", {10: None, 20: 9.0, 30: None, 40: None, 50: None}, 20),  # not measured is not best
    ],
)
def test_the_best_is_kept_as_well(
    tmp_path: Path, mode: Literal["min", "max"], losses: dict[int, float | None], best: int
) -> None:
    root = measured(tmp_path / "checkpoints", losses)
    prune_checkpoints(root, keep_last=2, keep_every=None, keep_best=KeepBestConfig(metric="loss/a", mode=mode))
    assert steps(root) == [best, 40, 50]


def test_a_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    rule = KeepBestConfig(metric="loss/a")
    root = measured(tmp_path / "checkpoints", {10: 1.0, 20: 2.0, 30: 3.0, 40: 0.5})
    prune_checkpoints(root, keep_last=2, keep_every=None, keep_best=rule)
    assert steps(root) == [30, 40]
    measured(root, {50: 3.0, 60: 3.0})
    prune_checkpoints(root, keep_last=2, keep_every=None, keep_best=rule)
    assert steps(root) == [40, 50, 60]


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    root = measured(tmp_path / "checkpoints", {10: 0.1, 20: 1.0, 30: 2.0, 40: 2.0})
    (step_directory(root, 10) / MANIFEST_NAME).write_text("{}")
    prune_checkpoints(root, keep_last=2, keep_every=None, keep_best=KeepBestConfig(metric="loss/a"))
    assert steps(root) == [20, 30, 40]


def test_what_is_still_read_stays(checkpoints: Path) -> None:
    assert prune_checkpoints(checkpoints, keep_last=2, keep_every=None, in_use=[30]) == [10, 20, 40, 50]


def test_fewer_than_are_kept_stay(checkpoints: Path) -> None:
    assert prune_checkpoints(checkpoints, keep_last=7, keep_every=None) == []
    assert len(steps(checkpoints)) == 7


def test_order_is_by_step_not_by_name_or_time(checkpoints: Path) -> None:
    late = step_directory(checkpoints, 12_345_678)  # more digits than the name is padded to
    late.mkdir()
    (late / MANIFEST_NAME).write_text("{}")
    prune_checkpoints(checkpoints, keep_last=2, keep_every=None)
    assert steps(checkpoints) == [70, 12_345_678]


def test_an_unfinished_checkpoint_does_not_count_as_one_of_the_last(checkpoints: Path) -> None:
    (step_directory(checkpoints, 70) / MANIFEST_NAME).unlink()
    prune_checkpoints(checkpoints, keep_last=2, keep_every=None)
    assert steps(checkpoints) == [50, 60]


def test_what_killed_writers_left_is_removed_and_nothing_else(checkpoints: Path) -> None:
    left_over = checkpoints / "step_0000080.tmp-1a2b3c4d"
    left_over.mkdir()
    (left_over / "__0_0.distcp").write_bytes(b"half")
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "best").mkdir()
    prune_checkpoints(checkpoints, keep_last=7, keep_every=None)
    assert not left_over.exists()
    assert (checkpoints / "notes.txt").exists() and (checkpoints / "best").is_dir()
    assert len(steps(checkpoints)) == 7


def test_a_checkpoint_that_is_going_is_never_found(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        seen.append(steps(checkpoints))

    monkeypatch.setattr("megatron_xmtf.checkpoint.retention.shutil.rmtree", interrupted)
    prune_checkpoints(checkpoints, keep_last=6, keep_every=None)
    assert seen == [[20, 30, 40, 50, 60, 70]]
    monkeypatch.undo()
    prune_checkpoints(checkpoints, keep_last=6, keep_every=None)
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step_{step:07d}" for step in range(20, 80, 10)]
