"""The directory beside a prefix in which a dataset is written, and what becomes of one that a killed run left.

    train.tmp-1f0c/lock              held while the writer lives: tells an interrupted run from a running one
    train.tmp-1f0c/journal.json      how far the files are good, and which run it was (`data.journal`)
    train.tmp-1f0c/*.tmp-part        what is written so far
    train.tmp-1f0c/committing        exists while files are moved to their final names

Found without a journal it is removed; with the journal of the same run it is taken over; with that of another run it
is refused, unless a new beginning is asked for.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_xmtf.data.dataset_manifest import COMMITTING, manifest_path, unfinished_directories
from megatron_xmtf.data.journal import JOURNAL, Journal, key_difference
from megatron_xmtf.errors import ConfigError, DatasetError, XmtfError
from megatron_xmtf.files import fsync_directory, fsync_tree, temporary_name

__all__ = ["LOCK", "MANIFEST", "WorkingDirectory", "working_directory"]

logger = logging.getLogger(__name__)
LOCK = "lock"
MANIFEST = "manifest.json"
"""Name of the manifest in the working directory."""


class WorkingDirectory:
    """A locked directory; `take` finds or makes it, `release` leaves it to a later run, `remove` deletes it."""

    path: Path
    journal: Journal | None
    """Of the interrupted run that it was taken over from; None for a new directory."""
    interrupted_commit: bool
    """An earlier run was killed while it moved files to their final names: those there are not a finished dataset."""

    def __init__(self, path: Path, lock: IO[str] | None, journal: Journal | None) -> None:
        self.path, self._lock, self.journal = path, lock, journal
        self.interrupted_commit = False

    @classmethod
    def take(cls, prefix: Path, *, key: Mapping[str, Any] | None, restart: bool) -> WorkingDirectory:
        """Take over what an interrupted run with the same key left, or make a new directory.

        Args:    key: what makes a run the same run (`data.journal`); None for a run that never goes on.
                 restart: throw away whatever was left.
        Raises:  DatasetError: another run is writing `prefix`, or an interrupted one with another key left its work.
        """
        found: WorkingDirectory | None = None
        interrupted = False
        try:
            for path in unfinished_directories(prefix):
                directory = _hold(path, prefix)
                if directory is None:
                    continue
                finished = _is_finished(path, prefix)
                if restart or finished or found is not None or not (path / JOURNAL).exists():
                    interrupted |= (path / COMMITTING).exists() and not manifest_path(prefix).exists()
                    logger.warning("removing %s, left by an interrupted run", path)
                    directory.remove()
                    continue
                found = directory
                found.journal = Journal.read(path)
                _refuse_other(found, prefix, key)
                interrupted |= (path / COMMITTING).exists() and not manifest_path(prefix).exists()
            if found is None:
                path = temporary_name(prefix)
                path.mkdir()
                found = cls(path, _lock_of(path), None)
        except BaseException:
            if found is not None:
                found.release()
            raise
        found.interrupted_commit = interrupted
        return found

    @property
    def is_committing(self) -> bool:
        """Whether files are being moved to their final names, or were when the run was killed."""
        return (self.path / COMMITTING).exists()

    def release(self) -> None:
        """Let go of the lock; everything stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def publish(self, path: Path) -> None:
        """Flush everything in it and rename it to `path`: for an output that is one directory.

        Raises:  ConfigError: `path` has come to exist.
        """
        for name in (JOURNAL, LOCK):
            (self.path / name).unlink(missing_ok=True)
        fsync_tree(self.path)
        if path.exists():
            raise ConfigError(f"{path} was made by another process meanwhile; this output is not published.")
        os.replace(self.path, path)
        fsync_directory(path.parent)
        self.release()

    def remove(self) -> None:
        """Delete the directory, its journal first: without it nobody takes over what is left of a half-deleted one."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


@contextmanager
def working_directory(prefix: Path, *, key: Mapping[str, Any], restart: bool) -> Iterator[WorkingDirectory]:
    """Yield the working directory of `prefix`, which is left to a later run if this one is stopped.

    An error of the user's, which would come again, removes it; a signal, a kill, or a defect leaves it.

    Raises:  DatasetError: as `WorkingDirectory.take`.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    directory = WorkingDirectory.take(prefix, key=key, restart=restart)
    try:
        yield directory
    except (XmtfError, OSError):
        directory.remove()
        raise
    finally:
        directory.release()


def _is_finished(path: Path, prefix: Path) -> bool:
    """Whether only the removal of the directory is left to do: its manifest has its final name."""
    return (path / COMMITTING).exists() and not (path / MANIFEST).exists() and manifest_path(prefix).exists()


def _refuse_other(found: WorkingDirectory, prefix: Path, key: Mapping[str, Any] | None) -> None:
    assert found.journal is not None
    difference = "it is of another command" if key is None else key_difference(found.journal.key, key)
    if difference:
        raise DatasetError(
            f"an interrupted run left its work on {prefix} in {found.path}, and this run is another: {difference}. "
            "Go on with the same command as then, or throw that work away: "
            + ("remove that directory." if key is None else "--restart.")
        )


def _hold(path: Path, prefix: Path) -> WorkingDirectory | None:
    """Lock a directory that exists; None when it was deleted meanwhile.

    Raises:  DatasetError: another run holds it.
    """
    try:
        lock = _lock_of(path)
    except BlockingIOError:
        raise DatasetError(
            f"another run is writing {prefix} now ({path.name}); wait for it, or choose another prefix."
        ) from None
    except FileNotFoundError:
        return None
    return WorkingDirectory(path, lock, None)


def _lock_of(directory: Path) -> IO[str] | None:
    """Hold the lock of a working directory; None where the file system has no locks.

    Raises:  BlockingIOError: another process holds it. FileNotFoundError: the directory is gone.
    """
    stream = open(directory / LOCK, "w", encoding="utf-8")  # noqa: SIM115 - kept open while the writer lives
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(stream.fileno()).st_nlink == 0:  # its owner deleted it while we waited
            raise FileNotFoundError(directory)
    except BlockingIOError:
        stream.close()
        raise
    except OSError as error:
        stream.close()
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logger.warning("%s is on a file system without locks: do not write it from two runs at once", directory.parent)
        return None
    return stream
