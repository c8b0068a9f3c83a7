"""Files that exist only when they are whole: atomic writes, hashes, safe paths.

A reader never sees a half-written file: everything is written under a temporary name beside its
final one, flushed to the disk, and renamed. What was left by a killed writer has a `.tmp-` in its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_xmtf.errors import ConfigError, DiskFullError, MissingError

__all__ = [
    "TEMPORARY_MARK",
    "atomic_directory",
    "atomic_write",
    "disk_errors",
    "fsync_directory",
    "read_json",
    "require_directory",
    "require_file",
    "safe_child",
    "sha256_file",
    "sha256_json",
    "write_json",
]

TEMPORARY_MARK = ".tmp-"
LONGEST_NAME = 255
"""Bytes of one name: NAME_MAX of Linux's file systems."""


def temporary_name(path: Path) -> Path:
    """Return a fresh sibling of `path` that no reader mistakes for it."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left' and 'file too large' into `DiskFullError`; other OS errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DiskFullError(
                f"{path} would be longer than this shell lets a file be; nothing under the final name was changed. "
                "Raise the limit (ulimit -f) and start again."
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free / 2**30
        raise DiskFullError(
            f"no space left while writing {path}: {free:.2f} GiB free; nothing under the final name was changed. "
            "Free space or choose another output directory."
        ) from error


def fsync_directory(path: Path) -> None:
    """Flush a directory entry, so that a rename in it survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary sibling for writing; on a clean exit flush it and rename it to `path`.

    Args:    path: final name; its directory is created. mode: "w" (UTF-8 text) or "wb".
    Raises:  DiskFullError: no space. On any error the temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    encoding = None if "b" in mode else "utf-8"
    try:
        with disk_errors(path):
            with open(temporary, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a fresh temporary directory; on a clean exit flush its files and rename it to `path`.

    Raises:  ConfigError: `path` exists (a finished output is never overwritten). DiskFullError: no space.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} exists already and is not overwritten; remove it or choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        with disk_errors(path):
            yield temporary
            fsync_tree(temporary)
            os.replace(temporary, path)
            fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root` to the disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(directory))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically; NaN and Inf are refused (they are not JSON)."""
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:  MissingError: no such file. ConfigError: not valid UTF-8 JSON; names file, line and column.
    """
    path = require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno} is not valid JSON: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start} cannot be decoded.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be read.") from error


def sha256_file(path: Path | str, *, block_size: int = 1 << 20) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(block_size):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def require_file(path: Path | str) -> Path:
    """Return `path` if it is a file.

    Raises:  MissingError: it is not.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise MissingError(f"{path} {what}; check the spelling and the current directory ({Path.cwd()}).")
    return path


def require_directory(path: Path | str) -> Path:
    """Return `path` if it is a directory.

    Raises:  MissingError: it is not.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise MissingError(f"{path} {what}; check the spelling and the current directory ({Path.cwd()}).")
    return path


def safe_child(root: Path, name: str) -> Path:
    """Join a name out of an untrusted file to `root`, refusing anything that leads outside.

    Raises:  ConfigError: absolute, `..`, NUL, or a link that leaves `root`.
    """
    if "\0" in name or os.path.isabs(name):
        raise ConfigError(f"{name!r} is not a plain relative name; it may not leave {root}.")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(name).parts):
        raise ConfigError(f"{name[:80]!r}... is longer than the {LONGEST_NAME} bytes that a file's name may have.")
    child = root / name
    if not child.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{name!r} leads outside {root}; only names below it are read.")
    return child
