"""The packing index: which examples of which dataset make up which row. An index, not a copy of the data.

    row_offsets  0     2        5      row 0 is entries 0-1, row 1 is entries 2-4
    dataset_ids  0  1  0  0  1         position in the mixture
    example_ids  7  2  3  9  2         example of that dataset, a segment each, in this order

On disk it is a directory of three .npy files and `packing.json`, which has the key, everything that went into the key,
the statistics, how many examples each dataset must have, and the size and SHA-256 of each file. It is written under a
temporary name and renamed when whole. A segment takes 6 bytes: 80 million take 0.5 GB.
"""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths, row_capacity
from megatron_xmtf.data.array_file import save_array
from megatron_xmtf.errors import ConfigError, DatasetError
from megatron_xmtf.files import atomic_directory, read_json, sha256_file, write_json

__all__ = ["ComponentStatistics", "DatasetStatistics", "PackingIndex", "PackingStatistics"]

FORMAT = "megatron_xmtf packing index"
VERSION = 2
"""2: example_ids in 32 bits where they suffice, and required_examples."""
MANIFEST = "packing.json"
ARRAYS: dict[str, tuple[type[np.integer], ...]] = {
    "row_offsets": (np.int64,),
    "dataset_ids": (np.uint16,),
    "example_ids": (np.uint32, np.int64),
}
"""Types that each array may have; example_ids are 64-bit only where a dataset has more than 4.29 billion examples."""
BLOCK = 1 << 20
"""Rows or segments checked at a time, so that a check takes no memory beside the index."""


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


class ComponentStatistics(TypedDict):
    """What an index holds of one component of the mixture."""

    name: str
    dataset: str
    wanted_share: float
    """Part of the whole that the mixture asks for, in its unit."""
    share: float
    """Part that it has."""
    available: int
    """Different examples that can be drawn."""
    examples: int
    """Segments in all rows."""
    epochs: float
    limited_by: str | None
    """max_epochs: every draw allowed was made; floor: its part was raised; None: neither."""


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
    """tokens / (rows * (sequence_length + 1)); of two sides, tokens / (rows * (encoder_length + decoder_length))."""
    encoder_fill_fraction: NotRequired[float]
    """Of rows of two sides: tokens of inputs / (rows * encoder_length)."""
    decoder_fill_fraction: NotRequired[float]
    """Of rows of two sides: tokens of targets / (rows * decoder_length)."""
    fewest_rows: NotRequired[int]
    """Of rows of two sides: no packing of these examples has fewer (`two_sided_fit.fewest_rows`)."""
    dropped: int
    truncated: int
    empty: int
    datasets: list[DatasetStatistics]
    components: list[ComponentStatistics]


@dataclass(frozen=True)
class PackingIndex:
    """Rows of a mixture, in training order."""

    row_offsets: NDArray[np.int64]
    """[rows + 1], from 0 to the number of segments."""
    dataset_ids: NDArray[np.uint16]
    """[segments], position of the dataset in the mixture."""
    example_ids: NDArray[np.integer]
    """[segments], number of the example in its dataset; uint32, or int64 where those do not suffice."""
    row_lengths: RowLengths
    """Tokens the model reads, a row holding one more; or the two lengths of an encoder-decoder."""
    long_examples: str
    """What `PackedRows` does with inputs that do not fit: `data.long_examples`."""
    statistics: PackingStatistics
    key: str
    """SHA-256 of everything that changes the index."""
    key_inputs: dict[str, Any]
    """What the key is the hash of."""
    required_examples: list[int] = field(default_factory=list)
    """[datasets], examples that each dataset must have: its largest number in the index + 1. Counted if not given."""

    def __post_init__(self) -> None:
        if not self.required_examples:
            counted = _count_required(self.dataset_ids, self.example_ids, num_datasets=len(self.statistics["datasets"]))
            object.__setattr__(self, "required_examples", counted)

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def sequence_length(self) -> int:
        """Tokens of a row that the model reads, those of both sides together."""
        lengths = self.row_lengths
        return lengths if isinstance(lengths, int) else lengths.encoder_length + lengths.decoder_length

    @property
    def capacity(self) -> int:
        """Tokens of examples that a row can hold."""
        return row_capacity(self.row_lengths)

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
            assert array.dtype in ARRAYS[name], f"{name} is {array.dtype}, not one of {ARRAYS[name]}"
            path = directory / f"{name}.npy"
            save_array(path, array)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(
            directory / MANIFEST,
            {
                "format": FORMAT,
                "version": VERSION,
                "key": self.key,
                "key_inputs": self.key_inputs,
                "sequence_length": self.sequence_length,
                **({} if isinstance(self.row_lengths, int) else {"two_sides": asdict(self.row_lengths)}),
                "long_examples": self.long_examples,
                "statistics": self.statistics,
                "required_examples": self.required_examples,
                "files": files,
            },
        )

    @staticmethod
    def load(directory: Path | str, *, key: str | None = None, verify: bool = True) -> PackingIndex:
        """Open an index, its arrays memory-mapped.

        Args:    key: the key the index must have; None takes any. verify: read all of it, compare every SHA-256 and
                 check that the parts agree. Once a run is enough: after that, False opens it in milliseconds and
                 reads only what is asked for, with names, sizes, types and the ends of `row_offsets` checked.
        Raises:  DatasetError: missing, truncated or altered files, or an index of another key or version.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory, key)
        arrays = {name: _load_array(directory, name, manifest["files"], verify=verify) for name in ARRAYS}
        statistics, required = cast(PackingStatistics, manifest["statistics"]), manifest["required_examples"]
        fault = _disagreement(arrays, statistics, required)
        if fault or (verify and (fault := _disagreement_inside(arrays, required))):
            raise _damaged(directory, fault)
        return PackingIndex(
            row_offsets=arrays["row_offsets"],
            dataset_ids=arrays["dataset_ids"],
            example_ids=arrays["example_ids"],
            row_lengths=_read_lengths(directory, manifest),
            long_examples=manifest["long_examples"],
            statistics=statistics,
            key=manifest["key"],
            key_inputs=manifest["key_inputs"],
            required_examples=required,
        )


def _count_required(
    dataset_ids: NDArray[np.uint16], example_ids: NDArray[np.integer], *, num_datasets: int
) -> list[int]:
    """Return how many examples each dataset must have, 0 for one that the index does not name."""
    required = np.zeros(num_datasets, np.int64)
    for begin in range(0, len(dataset_ids), BLOCK):
        numbers = example_ids[begin : begin + BLOCK].astype(np.int64)
        np.maximum.at(required, dataset_ids[begin : begin + BLOCK].astype(np.intp), numbers + 1)
    return [int(count) for count in required]


def _disagreement(arrays: dict[str, NDArray[Any]], statistics: PackingStatistics, required: list[int]) -> str:
    """Name the first way in which sizes and ends of an index do not fit together; "" if they do."""
    offsets, dataset_ids, example_ids = arrays["row_offsets"], arrays["dataset_ids"], arrays["example_ids"]
    if len(offsets) < 2 or offsets[0] != 0:
        return "row_offsets do not ascend from 0"
    if not offsets[-1] == len(dataset_ids) == len(example_ids):
        return f"{offsets[-1]} segments, {len(dataset_ids)} dataset and {len(example_ids)} example numbers"
    if len(offsets) - 1 != statistics["rows"]:
        return f"{len(offsets) - 1} rows, {statistics['rows']} in {MANIFEST}"
    if len(required) != len(statistics["datasets"]):
        return f"required_examples of {len(required)} datasets, statistics of {len(statistics['datasets'])}"
    return ""


def _disagreement_inside(arrays: dict[str, NDArray[Any]], required: list[int]) -> str:
    """Name the first way in which the contents of an index do not fit together; "" if they do."""
    offsets, dataset_ids, example_ids = arrays["row_offsets"], arrays["dataset_ids"], arrays["example_ids"]
    for begin in range(0, len(offsets) - 1, BLOCK):
        if np.any(np.diff(offsets[begin : begin + BLOCK + 1]) < 1):
            return "row_offsets do not ascend from 0"
    for begin in range(0, len(dataset_ids), BLOCK):
        if dataset_ids[begin : begin + BLOCK].max() >= len(required) or example_ids[begin : begin + BLOCK].min() < 0:
            return "a segment is of no dataset or of no example"
    if _count_required(dataset_ids, example_ids, num_datasets=len(required)) != required:
        return f"the largest example numbers are not those of required_examples in {MANIFEST}"
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
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(directory, f"{MANIFEST} is not that of a packing index")
    if manifest.get("version") != VERSION:
        raise DatasetError(
            f"packing index {directory} has version {manifest.get('version')}, this program reads {VERSION}. "
            "Remove that directory and run `xmtf pack CONFIG` again."
        )
    expected = {"key", "key_inputs", "sequence_length", "long_examples", "statistics", "required_examples", "files"}
    if not expected <= manifest.keys():
        missing = ", ".join(sorted(expected - manifest.keys()))
        raise _damaged(directory, f"{MANIFEST} has no {missing}")
    if key is not None and manifest["key"] != key:
        raise _damaged(directory, f"its key is {manifest['key']}, not {key}")
    statistics, files, required = manifest["statistics"], manifest["files"], manifest["required_examples"]
    if not isinstance(files, dict) or not isinstance(statistics, dict) or not {"rows", "datasets"} <= statistics.keys():
        raise _damaged(directory, f"{MANIFEST} has no statistics or no files")
    if not isinstance(required, list) or not all(isinstance(count, int) for count in required):
        raise _damaged(directory, f"{MANIFEST} has no numbers in required_examples")
    rows, length = statistics["rows"], manifest["sequence_length"]
    if not isinstance(rows, int) or not isinstance(length, int) or length < 1:
        raise _damaged(directory, f"{MANIFEST} has no whole number of rows or tokens of a row")
    if not isinstance(statistics["datasets"], list) or not isinstance(manifest["long_examples"], str):
        raise _damaged(directory, f"{MANIFEST} has no list of datasets or no policy for long examples")
    return manifest


def _read_lengths(directory: Path, manifest: dict[str, Any]) -> RowLengths:
    sides = manifest.get("two_sides")
    if sides is None:
        return int(manifest["sequence_length"])
    if not isinstance(sides, dict) or sides.keys() != {one.name for one in fields(EncoderDecoderLengths)}:
        raise _damaged(directory, f"{MANIFEST} has other two_sides than encoder_length, decoder_length, encoder_eos")
    if not all(isinstance(value, int) for value in sides.values()):
        raise _damaged(directory, f"{MANIFEST} has no whole numbers in two_sides")
    return EncoderDecoderLengths(**sides)


def _load_array(directory: Path, name: str, files: dict[str, Any], *, verify: bool) -> NDArray[Any]:
    """Open one array after comparing size and, to verify, hash; a flipped bit would silently change the order."""
    path = directory / f"{name}.npy"
    recorded = files.get(path.name)
    if not path.is_file() or not isinstance(recorded, dict):
        raise _damaged(directory, f"{path.name} is missing")
    size = path.stat().st_size
    if size != recorded.get("bytes"):
        raise _damaged(directory, f"{path.name} has {size} bytes instead of {recorded.get('bytes')}")
    if verify and sha256_file(path) != recorded.get("sha256"):
        raise _damaged(directory, f"{path.name} was altered (its SHA-256 differs)")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, ArithmeticError, MemoryError, SyntaxError, TokenError) as error:
        # numpy reads the header as a Python literal, and says of a damaged one what Python's parser does.
        raise _damaged(directory, f"{path.name} cannot be read ({error})") from error
    if array.ndim != 1 or array.dtype not in ARRAYS[name]:
        wanted = " or ".join(np.dtype(dtype).name for dtype in ARRAYS[name])
        raise _damaged(directory, f"{path.name} is {array.dtype} {list(array.shape)}, not one row of {wanted}")
    return array
