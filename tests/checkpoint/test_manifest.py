"""A checkpoint exists only when it is whole, and damage is named when it is opened."""

import json
from pathlib import Path

import pytest

from megatron_xmtf.checkpoint.directory import find_checkpoint, find_newest_valid, list_checkpoints, step_directory
from megatron_xmtf.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    begin_checkpoint,
    finish_checkpoint,
    hash_files,
    open_manifest,
    verify_hashes,
)
from megatron_xmtf.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    CorruptCheckpointError,
    MissingError,
)

FIELDS = {
    "architecture": {"family": "bloom"},
    "dtype": "float32",
    "config": {"seed": 42},
    "consumed_rows": 160,
    "contents": ["model"],
}


def write_checkpoint(path: Path, *, step: int = 20) -> Path:
    temporary = begin_checkpoint(path)
    (temporary / "__0_0.distcp").write_bytes(b"weights" * 100)
    (temporary / "hf").mkdir()
    (temporary / "hf" / "config.json").write_text("{}")
    finish_checkpoint(temporary, path, step=step, **FIELDS)
    return path


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = open_manifest(write_checkpoint(tmp_path / "step_0000020"))
    assert (manifest.step, manifest.consumed_rows, manifest.contents) == (20, 160, ("model",))
    assert manifest.config == {"seed": 42} and manifest.architecture == {"family": "bloom"}
    assert set(manifest.files) == {"__0_0.distcp", "hf/config.json"} and manifest.total_bytes == 702
    assert set(manifest.versions) == {"python", "megatron_xmtf", "torch", "megatron-core", "transformers"}
    verify_hashes(tmp_path / "step_0000020", manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000020"]


def test_known_hashes_are_taken_and_the_rest_computed(tmp_path: Path) -> None:
    temporary = begin_checkpoint(tmp_path / "step_0000001")
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (temporary / name).write_bytes(name.encode())
    (digest,) = hash_files(temporary, ["__1_0.distcp"]).values()
    written = {"__1_0.distcp": FileEntry(12, digest)}
    finish_checkpoint(temporary, tmp_path / "step_0000001", step=1, written=written, **FIELDS)
    verify_hashes(tmp_path / "step_0000001", open_manifest(tmp_path / "step_0000001"))


def test_a_file_that_is_no_longer_as_its_writer_left_it_is_not_published(tmp_path: Path) -> None:
    temporary = begin_checkpoint(tmp_path / "step_0000001")
    (temporary / "__0_0.distcp").write_bytes(b"half")
    for written in ({"__0_0.distcp": FileEntry(8, "0" * 64)}, {"__1_0.distcp": FileEntry(4, "0" * 64)}):
        with pytest.raises(CheckpointWriteError, match="is not published"):
            finish_checkpoint(temporary, tmp_path / "step_0000001", step=1, written=written, **FIELDS)
    assert not (tmp_path / "step_0000001").exists()


def test_validation_losses_are_kept_and_manifests_without_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "step_0000020"
    temporary = begin_checkpoint(path)
    finish_checkpoint(temporary, path, step=20, metrics={"loss/a/sw": 0.1}, **FIELDS)
    assert open_manifest(path).metrics == {"loss/a/sw": 0.1}
    contents = json.loads((path / MANIFEST_NAME).read_text())
    del contents["metrics"]
    (path / MANIFEST_NAME).write_text(json.dumps(contents))
    assert open_manifest(path).metrics == {}


def test_never_written_over(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "step_0000020")
    before = (path / MANIFEST_NAME).read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_checkpoint(path)
    assert (path / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"weights"), "has 7 bytes instead of 700"),
        (lambda path: (path / "__1_0.distcp").write_bytes(b""), "__1_0.distcp is not in the manifest"),
        (lambda path: (path / MANIFEST_NAME).unlink(), "never finished"),
        (lambda path: (path / MANIFEST_NAME).write_text('{"format": '), "not valid JSON"),
        (lambda path: (path / MANIFEST_NAME).write_text("{}"), "not the manifest"),
    ],
)
def test_damage_is_named_at_open(tmp_path: Path, damage: object, message: str) -> None:
    path = write_checkpoint(tmp_path / "step_0000020")
    damage(path)  # type: ignore[operator]
    with pytest.raises(CorruptCheckpointError, match=message):
        open_manifest(path)


def test_a_flipped_bit_passes_the_sizes_and_fails_the_hashes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "step_0000020")
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[350] ^= 1
    (path / "__0_0.distcp").write_bytes(data)
    manifest = open_manifest(path)
    with pytest.raises(CorruptCheckpointError, match="__0_0.distcp was altered"):
        verify_hashes(path, manifest)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a\0b"])
def test_a_name_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path / "step_0000020")
    contents = json.loads((path / MANIFEST_NAME).read_text())
    contents["files"][name] = {"bytes": 1, "sha256": "0"}
    (path / MANIFEST_NAME).write_text(json.dumps(contents))
    with pytest.raises(CorruptCheckpointError):
        open_manifest(path)


def test_a_newer_format_names_the_version_that_reads_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "step_0000020")
    contents = json.loads((path / MANIFEST_NAME).read_text())
    (path / MANIFEST_NAME).write_text(json.dumps({**contents, "format_version": 99}))
    with pytest.raises(CheckpointError, match="format_version 99"):
        open_manifest(path)


def test_find_by_step_number_in_run_and_checkpoints_directory(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    # By number, not by name or time: step 100 is written first, and sorts before 20 as text without zeros.
    for step in (100, 20):
        write_checkpoint(step_directory(checkpoints, step), step=step)
    (checkpoints / "step_0000200").mkdir()  # never finished
    (checkpoints / "step_0000300.tmp-1a2b3c4d").mkdir()
    newest = checkpoints / "step_0000100"
    assert [step for step, _ in list_checkpoints(checkpoints)] == [20, 100]
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(checkpoints) == find_checkpoint(newest) == newest


def test_a_damaged_newest_is_an_error_that_names_the_one_before(tmp_path: Path) -> None:
    for step in (20, 40):
        write_checkpoint(step_directory(tmp_path, step), step=step)
    (tmp_path / "step_0000040" / "__0_0.distcp").unlink()
    with pytest.raises(CorruptCheckpointError, match="next older one is .*step_0000020"):
        find_checkpoint(tmp_path)


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[350] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(data)


def test_the_newest_valid_is_found_by_hashes_and_damaged_ones_are_told_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (20, 40, 60, 80):
        write_checkpoint(step_directory(tmp_path, step), step=step)
    flip_a_bit(tmp_path / "step_0000040")  # passes the sizes
    (tmp_path / "step_0000060" / "__0_0.distcp").unlink()
    (tmp_path / "step_0000080" / MANIFEST_NAME).unlink()  # a copy that was broken off
    assert find_newest_valid(tmp_path) == tmp_path / "step_0000020"
    kept = ["damaged_step_0000040", "damaged_step_0000060", "damaged_step_0000080", "step_0000020"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 3 and all("DAMAGED CHECKPOINT" in message for message in told)
    assert "__0_0.distcp was altered" in told[2]
    # The step is trained and damaged again: nothing of the first time is lost.
    write_checkpoint(step_directory(tmp_path, 40), step=40)
    flip_a_bit(tmp_path / "step_0000040")
    find_newest_valid(tmp_path)
    assert (tmp_path / "damaged_step_0000040-2").is_dir()


def test_without_a_valid_checkpoint_nothing_is_set_aside(tmp_path: Path) -> None:
    assert find_newest_valid(tmp_path) is None
    flip_a_bit(write_checkpoint(tmp_path / "step_0000020"))
    with pytest.raises(CorruptCheckpointError, match="none of the 1 checkpoints .* is whole"):
        find_newest_valid(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000020"]


def test_what_is_no_checkpoint_gets_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="neither a checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingError, match="xmtf import --hf"):
        find_checkpoint(tmp_path)
