"""What the guards found, on the disk: one byte an example, and a report.

    flags_00000.npy   uint8 [examples of the first dataset]   1 duplicate, 2 near duplicate, 4 exact evaluation text,
    flags_00001.npy   ...                                     8 n-gram overlap with one; sums of these
    guards.json       key and what it is the hash of, report, size and SHA-256 of each file

The directory is written under a temporary name and renamed when whole; every byte is checked when it is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.array_file import save_array
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards.evaluation_index import EvaluationText
from megatron_xmtf.data.guards.settings import BITS, GuardSettings
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, DatasetError, nearest_names
from megatron_xmtf.files import read_json, sha256_file, sha256_json, write_json

__all__ = ["GuardFlags", "flags_path", "guards_key", "open_flags"]

FORMAT = "megatron_xmtf guard flags"
VERSION = 1
ALGORITHM_VERSION = 1
"""Goes up when the same data and settings would be flagged otherwise."""
MANIFEST = "guards.json"
WHOLE_FILE_BYTES = 1 << 26
"""Data without a manifest: files up to this size are hashed whole, larger ones in `SLICES` places."""
SLICES, SLICE_BYTES = 4096, 4096


@dataclass(frozen=True)
class GuardFlags:
    """Flags of every example of some datasets, and the report on them."""

    flags: list[NDArray[np.uint8]]
    """For each dataset [examples], sums of the bits of `settings.BITS`."""
    report: dict[str, Any]
    """`report.build_report`."""
    key: str
    """SHA-256 of everything that changes the flags."""
    key_inputs: dict[str, Any]
    """What the key is the hash of."""
    settings: GuardSettings
    """As given by whoever made or opened the flags: what is dropped is said here, and changes no flag."""

    def excluded(
        self, dataset_number: int, drop: Sequence[str] = ("duplicates", "near_duplicates", "contamination")
    ) -> NDArray[np.bool_]:
        """Tell which examples of a dataset some guards flagged, bool [examples].

        Args:    drop: names of guards; `GuardSettings.dropped()` are those that a configuration wants dropped.
        Raises:  ConfigError: no such guard.
        """
        mask = 0
        for name in drop:
            if name not in BITS:
                raise ConfigError(f"{name!r} is no guard; {nearest_names(name, BITS)}.")
            mask |= BITS[name]
        return (self.flags[dataset_number] & np.uint8(mask)) != 0

    def write(self, directory: Path) -> None:
        """Write the files into an empty directory (a temporary one, of `files.atomic_directory`)."""
        files = {}
        for number, flags in enumerate(self.flags):
            assert flags.dtype == np.uint8, f"flags are {flags.dtype}, the format has uint8"
            path = directory / f"flags_{number:05d}.npy"
            save_array(path, flags)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        facts = {"key": self.key, "key_inputs": self.key_inputs, "report": self.report, "files": files}
        write_json(directory / MANIFEST, {"format": FORMAT, "version": VERSION, **facts})


def guards_key(
    datasets: Sequence[ExampleDataset],
    *,
    tokenizer: Tokenizer,
    evaluation_texts: Sequence[EvaluationText],
    settings: GuardSettings,
    selected: Sequence[NDArray[np.bool_] | None] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Hash everything that changes the flags.

    Returns: (SHA-256 in hexadecimal, what was hashed). A dataset counts by its manifest's content, or without one by
             its sizes and a sample of its bytes; never by its path. What is done with finds (report, drop) is left out.
    """
    chosen = selected or [None] * len(datasets)
    inputs = {
        "algorithm_version": ALGORITHM_VERSION,
        "datasets": [
            {"name": dataset.name, "kind": dataset.kind, "sha256": _dataset_hash(dataset), "selected": _mask_hash(mask)}
            for dataset, mask in zip(datasets, chosen, strict=True)
        ],
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "settings": {name: (value != "off" if name in BITS else value) for name, value in asdict(settings).items()},
        "evaluation_texts": {"count": len(evaluation_texts), "sha256": _texts_hash(evaluation_texts)},
    }
    return sha256_json(inputs), inputs


def flags_path(directory: Path | str, key: str) -> Path:
    """Return the directory of the flags with this key; 16 of its 64 digits name it."""
    return Path(directory) / key[:16]


def open_flags(
    datasets: Sequence[ExampleDataset],
    *,
    tokenizer: Tokenizer,
    evaluation_texts: Sequence[EvaluationText],
    settings: GuardSettings,
    directory: Path | str,
    selected: Sequence[NDArray[np.bool_] | None] | None = None,
) -> GuardFlags:
    """Open the flags that `scan` made for the same arguments.

    Raises:  DatasetError: there are none, or they are damaged.
    """
    key, _ = guards_key(
        datasets, tokenizer=tokenizer, evaluation_texts=evaluation_texts, settings=settings, selected=selected
    )
    path = flags_path(directory, key)
    if not path.is_dir():
        raise DatasetError(
            f"there are no guard flags {path} for these datasets, evaluation tasks and guards; run `xmtf pack CONFIG` "
            "with the same configuration."
        )
    return load_flags(path, key=key, lengths=[len(dataset) for dataset in datasets], settings=settings)


def load_flags(path: Path, *, key: str, lengths: Sequence[int], settings: GuardSettings) -> GuardFlags:
    """Open one directory of flags after checking every byte.

    Raises:  DatasetError: missing, truncated or altered files, another key, or flags of other datasets.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except (FileNotFoundError, ConfigError) as error:
        raise _damaged(path, str(error)) from error
    expected = {"key", "key_inputs", "report", "files"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not expected <= manifest.keys():
        raise _damaged(path, f"{MANIFEST} is not that of guard flags")
    if manifest.get("version") != VERSION:
        raise DatasetError(
            f"guard flags {path} have version {manifest.get('version')}, this program reads {VERSION}. Remove that "
            "directory and run `xmtf pack CONFIG` again."
        )
    if manifest["key"] != key:
        raise _damaged(path, f"their key is {manifest['key']}, not {key}")
    files = manifest["files"]
    if not isinstance(files, dict) or len(files) != len(lengths):
        raise _damaged(path, f"{MANIFEST} does not list {len(lengths)} files")
    flags = [_load(path, f"flags_{number:05d}.npy", files, length) for number, length in enumerate(lengths)]
    return GuardFlags(flags, manifest["report"], manifest["key"], manifest["key_inputs"], settings)


def _load(directory: Path, name: str, files: dict[str, Any], length: int) -> NDArray[np.uint8]:
    path, recorded = directory / name, files.get(name)
    if not path.is_file() or not isinstance(recorded, dict):
        raise _damaged(directory, f"{name} is missing")
    if path.stat().st_size != recorded.get("bytes"):
        raise _damaged(directory, f"{name} has {path.stat().st_size} bytes instead of {recorded.get('bytes')}")
    if sha256_file(path) != recorded.get("sha256"):
        raise _damaged(directory, f"{name} was altered (its SHA-256 differs)")
    try:
        flags = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(directory, f"{name} cannot be read ({error})") from error
    if flags.dtype != np.uint8 or flags.shape != (length,):
        raise _damaged(directory, f"{name} is {flags.dtype} {list(flags.shape)}, not uint8 [{length}]")
    return flags


def _damaged(directory: Path, fault: str) -> DatasetError:
    return DatasetError(
        f"guard flags {directory} are damaged: {fault}. Remove that directory and run `xmtf pack CONFIG` again."
    )


def _dataset_hash(dataset: ExampleDataset) -> str:
    if dataset.manifest is not None:
        return sha256_json(dataset.manifest)
    digest = hashlib.sha256()
    for file in dataset.halves.values():
        digest.update(file.lengths.astype("<i8").tobytes())
        size = file.bin_path.stat().st_size
        with open(file.bin_path, "rb") as stream:
            if size <= WHOLE_FILE_BYTES:
                digest.update(stream.read())
                continue
            for place in np.linspace(0, size - SLICE_BYTES, SLICES).astype(np.int64).tolist():
                stream.seek(place)
                digest.update(stream.read(SLICE_BYTES))
    return digest.hexdigest()


def _mask_hash(mask: NDArray[np.bool_] | None) -> str | None:
    return None if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def _texts_hash(texts: Sequence[EvaluationText]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(sha256_json(asdict(text)).encode("ascii"))
    return digest.hexdigest()
