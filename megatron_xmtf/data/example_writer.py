"""Write a dataset so that it exists whole or not at all, whatever kills the writer and whenever.

Everything is written in a working directory beside the prefix and moved to its final names at the end:

    train.tmp-1f0c/lock          held while the writer lives: tells an interrupted run from a running one
    train.tmp-1f0c/committing    exists while files are moved to their final names
    1. all files and the manifest on the disk    2. an old manifest removed    3. .bin, columns, .idx renamed
    4. train.json renamed, last: from here on the dataset exists    5. working directory removed
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_xmtf import __version__
from megatron_xmtf.data.dataset_manifest import (
    COLUMNS,
    COLUMNS_FILE,
    COMMITTING,
    DOCUMENTS,
    FORMAT,
    FORMAT_VERSION,
    HALVES,
    Kind,
    dataset_file,
    expected_files,
    length_statistics,
    manifest_path,
    unfinished_directories,
)
from megatron_xmtf.data.indexed_dataset import IndexedDatasetWriter
from megatron_xmtf.errors import ConfigError, DatasetError
from megatron_xmtf.files import atomic_write, disk_errors, fsync_directory, sha256_file, temporary_name, write_json

__all__ = ["ExampleDatasetWriter"]

logger = logging.getLogger(__name__)
LOCK = "lock"
MANIFEST = "manifest.json"
"""Name of the manifest in the working directory."""


class ExampleDatasetWriter:
    """Append examples, then commit; a context manager. Left without `commit`, nothing is at the prefix.

    with ExampleDatasetWriter(prefix, kind="pairs", dtype=token_dtype(vocab_size), overwrite=False) as writer:
        writer.add({"inputs_document": (tokens, lengths), "targets_document": (tokens, lengths)}, columns)
        manifest = writer.commit({"tokenizer": ..., "counts": ...})
    """

    def __init__(self, prefix: Path | str, *, kind: Kind, dtype: np.dtype[Any], overwrite: bool) -> None:
        """Raises: ConfigError: the prefix is no file name. DatasetError: a dataset is there, or being written."""
        self.prefix, self.kind, self.dtype, self.overwrite = Path(prefix), kind, dtype, overwrite
        if not self.prefix.name or str(prefix).endswith(("/", os.sep)) or self.prefix.is_dir():
            raise ConfigError(
                f"output prefix {prefix} is a directory; give a file name to begin with, such as {self.prefix}/train."
            )
        self.num_examples = 0
        self._columns = {name: _Column() for name in COLUMNS}
        self._documents: list[np.ndarray] = []

    def __enter__(self) -> ExampleDatasetWriter:
        self._stack = ExitStack()
        with disk_errors(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            interrupted = _remove_interrupted(self.prefix)
            self._refuse_existing(interrupted=interrupted)
            self._directory = temporary_name(self.prefix)
            self._directory.mkdir()
            self._lock = _take_lock(self._directory)
            self._halves = {
                half: self._stack.enter_context(IndexedDatasetWriter(self._directory / half, dtype=self.dtype))
                for half in HALVES[self.kind]
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()

    def add(
        self,
        halves: Mapping[str, tuple[np.ndarray, np.ndarray]],
        columns: Mapping[str, tuple[Sequence[str], np.ndarray]],
        *,
        documents: np.ndarray | None = None,
        document_lengths: np.ndarray | None = None,
    ) -> None:
        """Append examples.

        Args:    halves: name of the half -> (tokens [sum of lengths], lengths [examples]).
                 columns: name -> (names, integers [examples] that index them); a missing column is "" throughout.
                 documents: uint64 [examples], `ExampleDataset.documents`; given with all examples or with none.
                 document_lengths: examples of each document, as `IndexedDatasetWriter.add` takes it.
        """
        count = len(halves[HALVES[self.kind][0]][1])
        assert all(len(lengths) == count for _, lengths in halves.values()), "halves are out of step"
        for half, writer in self._halves.items():
            tokens, lengths = halves[half]
            with disk_errors(self.prefix):
                writer.add(tokens, lengths, document_lengths=document_lengths)
        for name, column in self._columns.items():
            names, codes = columns.get(name, ([""], np.zeros(count, np.uint8)))
            column.add(names, codes)
        if documents is not None:
            assert len(documents) == count, "documents are out of step"
            self._documents.append(documents.astype("<u8"))
        self.num_examples += count

    def commit(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Finish the files, move them to their names, write the manifest; return it.

        Args:    facts: what the caller knows: tokenizer (or None), counts, settings ...
        """
        self._stack.close()
        columns = {name: column for name, column in self._columns.items() if column.says_something}
        files = {
            half + suffix: {"bytes": written.bytes, "sha256": written.sha256}
            for half, writer in self._halves.items()
            for suffix, written in writer.files.items()
        }
        documents = np.concatenate([np.empty(0, "<u8"), *self._documents])
        assert len(documents) in (0, self.num_examples), "documents of some examples only"
        has_documents = bool(len(documents))
        if columns or has_documents:
            path = self._directory / COLUMNS_FILE
            arrays: dict[str, Any] = {name: column.codes() for name, column in columns.items()}
            if has_documents:
                arrays[DOCUMENTS] = documents
            with atomic_write(path, "wb") as stream:
                np.savez(stream, **arrays)
            files[COLUMNS_FILE] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        assert set(files) == expected_files(self.kind, has_columns=COLUMNS_FILE in files)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "num_examples": self.num_examples,
            "tokens": {half.split("_")[0]: writer.num_tokens for half, writer in self._halves.items()},
            "dtype": self.dtype.name,
            **facts,
            "lengths": self._length_statistics(),
            "columns": {name: {"names": column.names, "counts": column.counts()} for name, column in columns.items()},
            "documents": has_documents,
            "files": files,
            "code_version": __version__,
        }
        write_json(self._directory / MANIFEST, manifest)
        self._move(sorted(files, key=lambda name: name.endswith(".idx")))
        return manifest

    def _length_statistics(self) -> dict[str, Any]:
        lengths = {half.split("_")[0]: writer.lengths() for half, writer in self._halves.items()}
        if self.kind == "pairs":
            lengths["examples"] = lengths["inputs"] + lengths["targets"]
        return {name: length_statistics(values) for name, values in lengths.items()}

    def _move(self, names: Sequence[str]) -> None:
        with disk_errors(self.prefix):
            (self._directory / COMMITTING).touch()
            fsync_directory(self._directory)
            manifest_path(self.prefix).unlink(missing_ok=True)
            for path in _files_at(self.prefix):
                path.unlink()
            fsync_directory(self.prefix.parent)
            for name in names:
                os.replace(self._directory / name, dataset_file(self.prefix, name))
            fsync_directory(self.prefix.parent)
            os.replace(self._directory / MANIFEST, manifest_path(self.prefix))
            fsync_directory(self.prefix.parent)

    def _refuse_existing(self, *, interrupted: bool) -> None:
        if self.overwrite:
            return
        finished = manifest_path(self.prefix).exists()
        existing = [manifest_path(self.prefix)] if finished else [] if interrupted else _files_at(self.prefix)
        if existing:
            raise DatasetError(
                f"{existing[0]} exists already: there is a dataset at {self.prefix}. Choose another output prefix, or "
                "give --overwrite to replace it (the old one stays until the new one is whole)."
            )


class _Column:
    """Names in the order of their first appearance, and one small integer an example."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._code_of: dict[str, int] = {}
        self._parts: list[np.ndarray] = []

    def add(self, names: Sequence[str], codes: np.ndarray) -> None:
        """Append integers that index `names`; names that no integer uses are not taken over."""
        used, first = np.unique(codes, return_index=True)
        table = np.zeros(len(names), np.uint32)
        for local in used[np.argsort(first)]:
            name = names[int(local)]
            if name not in self._code_of:
                self._code_of[name] = len(self.names)
                self.names.append(name)
            table[local] = self._code_of[name]
        # Stored as small as this part allows: a byte an example for most data.
        self._parts.append(table[codes].astype(np.min_scalar_type(int(table.max(initial=0)))))

    @property
    def says_something(self) -> bool:
        return self.names not in ([], [""])

    def codes(self) -> np.ndarray:
        """Return the integers of all examples in the smallest unsigned type."""
        return np.concatenate([np.empty(0, np.uint8), *self._parts])

    def counts(self) -> list[int]:
        """Return the number of examples of each name."""
        return np.bincount(self.codes(), minlength=len(self.names)).tolist()


def _files_at(prefix: Path) -> list[Path]:
    """Return the files of a dataset of any kind that exist at `prefix`, its manifest not among them."""
    names = sorted(set().union(*(expected_files(kind, has_columns=True) for kind in HALVES)))
    return [path for name in names if (path := dataset_file(prefix, name)).exists()]


def _take_lock(directory: Path) -> IO[str] | None:
    """Hold the lock of a working directory; None where the file system has no locks.

    Raises:  BlockingIOError: another process holds it.
    """
    stream = open(directory / LOCK, "w", encoding="utf-8")  # noqa: SIM115 - kept open while the writer lives
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _remove_interrupted(prefix: Path) -> bool:
    """Delete what killed runs left; return whether one was killed while its files were moved into place.

    Raises:  DatasetError: another run is writing this prefix now.
    """
    interrupted = False
    for directory in unfinished_directories(prefix):
        try:
            lock = _take_lock(directory)
        except BlockingIOError:
            raise DatasetError(
                f"another run is writing {prefix} now ({directory.name}); wait for it, or choose another prefix."
            ) from None
        interrupted |= (directory / COMMITTING).exists() and not manifest_path(prefix).exists()
        logger.warning("removing %s, left by an interrupted run", directory)
        shutil.rmtree(directory)
        if lock is not None:
            lock.close()
    return interrupted
