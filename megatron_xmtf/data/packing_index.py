"""The packing index: which examples of which dataset make up which row. An index, not a copy of the data.

    row_offsets  0     2        5      row 0 is entries 0-1, row 1 is entries 2-4
    dataset_ids  0  1  0  0  1         position in the mixture
    example_ids  7  2  3  9  2         example of that dataset, a segment each, in this order

On disk it is a directory of three .npy files and `packing.json`, which has the key, everything that went into the key,
the statistics, and the size and SHA-256 of each file. It is written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.errors import ConfigError, DatasetError
from megatron_xmtf.files import atomic_directory, read_json, sha256_file, write_json

__all__ = ["DatasetStatistics", "PackingIndex", "PackingStatistics"]

FORMAT = "megatron_xmtf packing index"
VERSION = 1
MANIFEST = "packing.json"
ARRAYS = {"row_offsets": np.int64, "dataset_ids": np.uint16, "example_ids": np.int64}


class DatasetStatistics(TypedDict):
    """What an index holds of one dataset."""

    name: str
    examples: int
    """Segments in all rows, repeats included."""
    repeats: int
    """Segments beyond the first of each example."""
    epochs: float
    """Segments per example that can be drawn."""
    tokens: int
    target_tokens: int
    """Labels that the loss is taken over."""
    dropped: int
    """Different examples left out because they are too long for a row."""
    truncated: int
    """Different examples whose inputs are cut to fit a row."""
    empty: int
    """Different examples left out because they have no target."""


class PackingStatistics(TypedDict):
    """What an index holds; counts as in `DatasetStatistics`, summed."""

    rows: int
    examples: int
    repeats: int
    epochs: int
    """Passes over the mixture that were packed one after the other."""
    tokens: int
    target_tokens: int
    fill_fraction: float
    """tokens / (rows * (sequence_length + 1))."""
    dropped: int
    truncated: int
    empty: int
    datasets: list[DatasetStatistics]


@dataclass(frozen=True)
class PackingIndex:
    """Rows of a mixture, in training order."""

    row_offsets: NDArray[np.int64]
    """[rows + 1], from 0 to the number of segments."""
    dataset_ids: NDArray[np.uint16]
    """[segments], position of the dataset in the mixture."""
    example_ids: NDArray[np.int64]
    """[segments], number of the example in its dataset."""
    sequence_length: int
    """Tokens the model reads; a row holds one more."""
    long_examples: str
    """What `PackedRows` does with inputs that do not fit: `data.long_examples`."""
    statistics: PackingStatistics
    key: str
    """SHA-256 of everything that changes the index."""
    key_inputs: dict[str, Any]
    """What the key is the hash of."""

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def save(self, directory: Path | str) -> None:
        """Write the index to `directory`; if another process finished it there first, leave that one.

        Raises:  DiskFullError: no space; nothing is left behind.
        """
        directory = Path(directory)
        if directory.exists():
            return
        try:
            with atomic_directory(directory) as temporary:
                self._write(temporary)
        except ConfigError:
            if not directory.exists():
                raise
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise

    def _write(self, directory: Path) -> None:
        arrays: dict[str, NDArray[Any]] = {
            "row_offsets": self.row_offsets,
            "dataset_ids": self.dataset_ids,
            "example_ids": self.example_ids,
        }
        files = {}
        for name, array in arrays.items():
            assert array.dtype == ARRAYS[name], f"{name} is {array.dtype}, the format has {ARRAYS[name]}"
            path = directory / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(
            directory / MANIFEST,
            {
                "format": FORMAT,
                "version": VERSION,
                "key": self.key,
                "key_inputs": self.key_inputs,
                "sequence_length": self.sequence_length,
                "long_examples": self.long_examples,
                "statistics": self.statistics,
                "files": files,
            },
        )

    @staticmethod
    def load(directory: Path | str, *, key: str | None = None) -> PackingIndex:
        """Open an index, its arrays memory-mapped, after checking every byte and that the parts agree.

        Args:    key: the key the index must have; None takes any.
        Raises:  DatasetError: missing, truncated or altered files, or an index of another key.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory, key)
        arrays = {name: _load_array(directory, name, manifest["files"]) for name in ARRAYS}
        statistics = cast(PackingStatistics, manifest["statistics"])
        if fault := _disagreement(arrays, statistics):
            raise _damaged(directory, fault)
        return PackingIndex(
            row_offsets=arrays["row_offsets"],
            dataset_ids=arrays["dataset_ids"],
            example_ids=arrays["example_ids"],
            sequence_length=manifest["sequence_length"],
            long_examples=manifest["long_examples"],
            statistics=statistics,
            key=manifest["key"],
            key_inputs=manifest["key_inputs"],
        )


def _disagreement(arrays: dict[str, NDArray[Any]], statistics: PackingStatistics) -> str:
    """Name the first way in which the parts of an index do not fit together; "" if they do."""
    offsets, dataset_ids, example_ids = arrays["row_offsets"], arrays["dataset_ids"], arrays["example_ids"]
    if len(offsets) < 2 or offsets[0] != 0 or np.any(np.diff(offsets) < 1):
        return "row_offsets do not ascend from 0"
    if not offsets[-1] == len(dataset_ids) == len(example_ids):
        return f"{offsets[-1]} segments, {len(dataset_ids)} dataset and {len(example_ids)} example numbers"
    if len(offsets) - 1 != statistics["rows"]:
        return f"{len(offsets) - 1} rows, {statistics['rows']} in {MANIFEST}"
    if dataset_ids.max() >= len(statistics["datasets"]) or example_ids.min() < 0:
        return "a segment is of no dataset or of no example"
    return ""


def _damaged(directory: Path, fault: str) -> DatasetError:
    return DatasetError(
        f"packing index {directory} is damaged: {fault}. Remove that directory and run `xmtf pack CONFIG` again."
    )


def _read_manifest(directory: Path, key: str | None) -> dict[str, Any]:
    if not directory.is_dir():
        raise DatasetError(f"there is no packing index {directory}; build it with `xmtf pack CONFIG`.")
    try:
        manifest = read_json(directory / MANIFEST)
    except (FileNotFoundError, ConfigError) as error:
        raise _damaged(directory, str(error)) from error
    expected = {"key", "key_inputs", "sequence_length", "long_examples", "statistics", "files"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not expected <= manifest.keys():
        raise _damaged(directory, f"{MANIFEST} is not that of a packing index")
    if manifest.get("version") != VERSION:
        raise DatasetError(
            f"packing index {directory} has version {manifest.get('version')}, this program reads {VERSION}. "
            "Remove that directory and run `xmtf pack CONFIG` again."
        )
    if key is not None and manifest["key"] != key:
        raise _damaged(directory, f"its key is {manifest['key']}, not {key}")
    statistics, files = manifest["statistics"], manifest["files"]
    if not isinstance(files, dict) or not isinstance(statistics, dict) or not {"rows", "datasets"} <= statistics.keys():
        raise _damaged(directory, f"{MANIFEST} has no statistics or no files")
    return manifest


def _load_array(directory: Path, name: str, files: dict[str, Any]) -> NDArray[Any]:
    """Open one array after comparing size and hash; a flipped bit would silently change the training order."""
    path = directory / f"{name}.npy"
    recorded = files.get(path.name)
    if not path.is_file() or not isinstance(recorded, dict):
        raise _damaged(directory, f"{path.name} is missing")
    size = path.stat().st_size
    if size != recorded.get("bytes"):
        raise _damaged(directory, f"{path.name} has {size} bytes instead of {recorded.get('bytes')}")
    if sha256_file(path) != recorded.get("sha256"):
        raise _damaged(directory, f"{path.name} was altered (its SHA-256 differs)")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(directory, f"{path.name} cannot be read ({error})") from error
    if array.ndim != 1 or array.dtype != ARRAYS[name]:
        raise _damaged(directory, f"{path.name} is {array.dtype} {list(array.shape)}, not one row of {ARRAYS[name]}")
    return array
