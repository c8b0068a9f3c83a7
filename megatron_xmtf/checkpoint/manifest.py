"""What a checkpoint is and whether it is whole: `manifest.json`, written last, then one rename.

    CKPT/.metadata *.distcp common.pt metadata.json    torch_dist files, as Megatron-Core writes them
    CKPT/hf/config.json tokenizer.json ...             what an export needs besides the weights
    CKPT/manifest.json                                 this file: name, size and SHA-256 of every other one

A checkpoint is written under a temporary name beside its final one and renamed when its manifest is on the
disk, so a directory with a manifest was finished; sizes are checked whenever it is opened, hashes on request.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import CheckpointError, CheckpointWriteError, ConfigError, CorruptCheckpointError
from megatron_xmtf.files import (
    disk_errors,
    fsync_directory,
    read_json,
    require_directory,
    safe_child,
    sha256_file,
    temporary_name,
    write_json,
)

__all__ = [
    "MANIFEST_NAME",
    "CheckpointManifest",
    "FileEntry",
    "begin_checkpoint",
    "check_found_hashes",
    "discard_checkpoint",
    "finish_checkpoint",
    "hash_files",
    "open_manifest",
    "verify_descriptions",
    "verify_hashes",
]

MANIFEST_NAME = "manifest.json"
FORMAT = "megatron_xmtf.checkpoint"
FORMAT_VERSION = 1
SHARD_SUFFIXES = (".distcp", ".metadata", ".pt")
"""A file with such a name that the manifest does not list is not ours: it could be read by mistake."""


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of a checkpoint."""

    bytes: int
    """Length of the file."""
    sha256: str
    """Hexadecimal SHA-256 of its bytes."""


@dataclass(frozen=True)
class CheckpointManifest:
    """What `manifest.json` says."""

    step: int
    """Optimizer steps done; 0 for an imported model."""
    architecture: dict[str, Any]
    """The model's shape, and `family`: the row of `conversion.mapping.FAMILIES` it belongs to."""
    dtype: str
    """Type of the stored weights, in torch's spelling (float32, bfloat16, float16), or `mixed`."""
    config: dict[str, Any] | None
    """Resolved run configuration; None for an imported model."""
    consumed_rows: int
    """Rows trained on, the data cursor."""
    contents: tuple[str, ...]
    """Subset of model, optimizer, rng."""
    versions: dict[str, str]
    """Versions of what wrote it."""
    files: dict[str, FileEntry]
    """Relative name (with `/`) -> size and hash of every file but the manifest."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Validation losses measured at this step, by name; empty: none were."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What it was made of where that is neither a run nor a Hugging Face model: the averaged checkpoints and their
    weights, the step of another program's run. Empty otherwise."""
    format: str = FORMAT
    """Always `megatron_xmtf.checkpoint`."""
    format_version: int = FORMAT_VERSION
    """Counts incompatible changes of this layout."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())


def begin_checkpoint(path: Path | str) -> Path:
    """Make the temporary directory of a checkpoint; one rank calls it and tells the others the name.

    Raises:  ConfigError: `path` exists; a checkpoint is never overwritten in place (its old and new shards
             would load together without an error).
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} exists already and is not overwritten; remove it or choose another name.")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        temporary.mkdir()
    return temporary


def finish_checkpoint(
    temporary: Path,
    path: Path | str,
    *,
    step: int,
    architecture: Mapping[str, Any],
    dtype: str,
    config: Mapping[str, Any] | None,
    consumed_rows: int,
    contents: Iterable[str],
    metrics: Mapping[str, float] | None = None,
    origin: Mapping[str, Any] | None = None,
    written: Mapping[str, FileEntry] | None = None,
) -> CheckpointManifest:
    """Write the manifest, flush everything, rename; one rank calls it when all ranks have written.

    Args:    temporary: what `begin_checkpoint` returned. path: the final name. contents: of model, optimizer, rng.
             metrics: validation losses of this step. origin: as in the manifest. written: relative name -> size and
             hash of files that their writers have flushed and read back; the others are hashed and flushed here.
    Raises:  ConfigError: `path` has come to exist. CheckpointWriteError: a file is not as its writer left it.
             DiskFullError: no space.
    """
    path = Path(path)
    with disk_errors(path):
        known = dict(written or {})
        names = _file_names(temporary)
        sizes = {name: (temporary / name).stat().st_size for name in names}
        _check_still_there(temporary, known, sizes)
        rest = [name for name in names if name not in known]
        for name, digest in hash_files(temporary, rest).items():
            known[name] = FileEntry(sizes[name], digest)
        manifest = CheckpointManifest(
            step=step,
            architecture=dict(architecture),
            dtype=dtype,
            config=None if config is None else dict(config),
            consumed_rows=consumed_rows,
            contents=tuple(contents),
            versions=_versions(),
            files={name: known[name] for name in names},
            metrics=dict(metrics or {}),
            origin=dict(origin or {}),
        )
        write_json(temporary / MANIFEST_NAME, asdict(manifest))
        _flush(temporary, rest)
        if path.exists():
            raise ConfigError(f"{path} was made by another process meanwhile; this checkpoint is not published.")
        os.replace(temporary, path)
        try:
            fsync_directory(path.parent)
        except OSError:
            # The name may not outlive a power loss: what is reported as not written must not be found either.
            os.replace(path, temporary)
            raise
    return manifest


def _check_still_there(directory: Path, written: Mapping[str, FileEntry], sizes: Mapping[str, int]) -> None:
    """Refuse to publish what is no longer as its writer left it (a full node-local disk, a cleaner of old files)."""
    changed = [name for name, entry in written.items() if sizes.get(name) != entry.bytes]
    if changed:
        raise CheckpointWriteError(
            f"{directory} is not published: {', '.join(changed[:5])} were written by a rank and are not there with "
            "their size. Do all ranks see one file system at this path?"
        )


def _flush(directory: Path, names: Iterable[str]) -> None:
    """Flush files, and every directory's entries, to the disk."""
    for name in names:
        descriptor = os.open(directory / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        fsync_directory(path)


def discard_checkpoint(temporary: Path) -> None:
    """Remove an unfinished checkpoint; nothing happens if it was renamed or is gone."""
    shutil.rmtree(temporary, ignore_errors=True)


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files below `directory`, several at a time (hashing leaves the interpreter free)."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_file(directory / name), names), strict=True))


def open_manifest(directory: Path | str) -> CheckpointManifest:
    """Read a checkpoint's manifest and check that every file is there with its length (fast).

    Raises:  MissingError: no such directory. CorruptCheckpointError: no manifest, or files that are missing,
             of another length, or shards that are not in the manifest; all of them are named.
    """
    directory = require_directory(directory)
    manifest = _read_manifest(directory)
    problems = []
    for name, entry in manifest.files.items():
        try:
            path = safe_child(directory, name)
        except ConfigError as error:
            raise CorruptCheckpointError(f"{directory / MANIFEST_NAME}: {error}") from error
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name} has {path.stat().st_size:,} bytes instead of {entry.bytes:,}")
    unlisted = [name for name in _file_names(directory) if name not in manifest.files]
    problems += [f"{name} is not in the manifest" for name in unlisted if name.endswith(SHARD_SUFFIXES)]
    if problems:
        raise CorruptCheckpointError(_damaged(directory, problems))
    return manifest


def verify_hashes(directory: Path | str, manifest: CheckpointManifest, *, names: Iterable[str] | None = None) -> None:
    """Read every file of a checkpoint and compare its SHA-256 with the manifest's.

    Args:    names: the files to read; None: all.
    Raises:  CorruptCheckpointError: names every file whose bytes were altered.
    """
    try:
        found = hash_files(Path(directory), manifest.files if names is None else names)
    except OSError as error:  # the disk refuses to read a file that is there
        raise CorruptCheckpointError(_damaged(Path(directory), [str(error)])) from error
    check_found_hashes(directory, manifest, found)


def check_found_hashes(directory: Path | str, manifest: CheckpointManifest, found: Mapping[str, str]) -> None:
    """Compare SHA-256 of files that were read with the manifest's.

    Args:    found: file -> hexadecimal SHA-256.
    Raises:  CorruptCheckpointError: names every file whose bytes were altered.
    """
    altered = [name for name, digest in found.items() if digest != manifest.files[name].sha256]
    if altered:
        raise CorruptCheckpointError(_damaged(Path(directory), [f"{name} was altered" for name in altered]))


def verify_descriptions(directory: Path | str, manifest: CheckpointManifest) -> None:
    """Compare all but the shards, which are large, with the manifest: what says where tensors are, the side files.

    Raises:  CorruptCheckpointError: names every file whose bytes were altered.
    """
    verify_hashes(directory, manifest, names=[name for name in manifest.files if not name.endswith(".distcp")])


def _damaged(directory: Path, problems: list[str]) -> str:
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    return (
        f"{directory} is not whole: {'; '.join(problems[:10])}{more}. "
        "Use another checkpoint, or copy this one again from where it came."
    )


def _file_names(directory: Path) -> list[str]:
    """Name all files below `directory` but the manifest, sorted, with `/`."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_NAME)


def _read_manifest(directory: Path) -> CheckpointManifest:
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{directory} has no {MANIFEST_NAME}: it is not a checkpoint, or one that was never finished. "
            "Give another one; a Hugging Face model becomes a checkpoint by `xmtf import --hf DIR --output CKPT`."
        )
    try:
        value = read_json(path)
    except ConfigError as error:
        raise CorruptCheckpointError(f"the manifest cannot be read: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CorruptCheckpointError(f"{path} is not the manifest of a checkpoint: `format` is not {FORMAT!r}.")
    if value.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {value.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
            f"use the version that wrote it ({value.get('versions')})."
        )
    try:
        files = {
            str(name): FileEntry(bytes=int(entry["bytes"]), sha256=str(entry["sha256"]))
            for name, entry in value["files"].items()
        }
        return CheckpointManifest(
            step=int(value["step"]),
            architecture=dict(value["architecture"]),
            dtype=str(value["dtype"]),
            config=None if value["config"] is None else dict(value["config"]),
            consumed_rows=int(value["consumed_rows"]),
            contents=tuple(value["contents"]),
            versions=dict(value["versions"]),
            files=files,
            metrics={str(name): float(number) for name, number in value.get("metrics", {}).items()},
            origin=dict(value.get("origin", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCheckpointError(f"{path} is not a whole manifest: {type(error).__name__} {error}.") from error


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("megatron_xmtf", "torch", "megatron-core", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
