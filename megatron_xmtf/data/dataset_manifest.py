"""Names of a dataset's files, and the manifest `<prefix>.json` that commits and describes them.

The manifest is written last: a dataset with a manifest was finished. Files are named in it by what follows
`<prefix>_`, so that a dataset stays whole when all its files are renamed or moved together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_xmtf.errors import DatasetError, XmtfError
from megatron_xmtf.files import TEMPORARY_MARK, read_json

__all__ = [
    "COLUMNS",
    "COLUMNS_FILE",
    "COMMITTING",
    "DOCUMENTS",
    "FORMAT",
    "FORMAT_VERSION",
    "HALVES",
    "Kind",
    "dataset_file",
    "expected_files",
    "find_kind",
    "length_statistics",
    "manifest_path",
    "read_manifest",
    "unfinished_directories",
    "verify_sizes",
]

Kind = Literal["pairs", "text"]
HALVES: dict[Kind, tuple[str, ...]] = {"pairs": ("inputs_document", "targets_document"), "text": ("text_document",)}
"""Indexed files of each kind of dataset: `<prefix>_<half>.bin` and `.idx`."""
COLUMNS = ("dataset", "language", "template", "task", "config", "split", "template_language")
"""Record fields kept for every example as a small integer that stands for a name."""
DOCUMENTS = "document"
"""Array of the columns' file: uint64 [examples], the number of the document that each example was made of."""
COLUMNS_FILE = "columns.npz"
COMMITTING = "committing"
"""File of a writer's working directory that exists while files are moved to their final names."""
FORMAT = "megatron_xmtf.examples"
FORMAT_VERSION = 1
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def manifest_path(prefix: Path) -> Path:
    """Return `<prefix>.json`."""
    return prefix.with_name(prefix.name + ".json")


def dataset_file(prefix: Path, name: str) -> Path:
    """Return `<prefix>_<name>`; `name` is a half without suffix, a file of it, or the columns' file."""
    return prefix.with_name(f"{prefix.name}_{name}")


def expected_files(kind: Kind, *, has_columns: bool) -> set[str]:
    """Return the names, without `<prefix>_`, of the files of a dataset beside its manifest."""
    files = {f"{half}{suffix}" for half in HALVES[kind] for suffix in (".bin", ".idx")}
    return files | {COLUMNS_FILE} if has_columns else files


def unfinished_directories(prefix: Path) -> Iterator[Path]:
    """Find what killed or still running writers of `prefix` left beside it."""
    if prefix.parent.is_dir():
        mark = prefix.name + TEMPORARY_MARK
        yield from sorted(path for path in prefix.parent.iterdir() if path.name.startswith(mark) and path.is_dir())


def length_statistics(lengths: np.ndarray | Iterable[np.ndarray]) -> dict[str, Any]:
    """Summarise lengths in tokens: mean, quantiles, and counts per power of two.

    >>> length_statistics(np.array([1, 2, 3, 4]))["histogram"]      # "4": more than 2, at most 4
    {'1': 1, '2': 1, '4': 2}

    Args:    lengths: integers [examples], at once or in blocks; memory grows with the number of different lengths.
    """
    counts: Counter[int] = Counter()
    for block in [lengths] if isinstance(lengths, np.ndarray) else lengths:
        values, times = np.unique(block, return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    if not counts:
        return {"min": 0, "mean": 0.0, **dict.fromkeys(QUANTILES, 0), "max": 0, "histogram": {}}
    ordered = np.array(sorted(counts), np.int64)
    up_to = np.cumsum([counts[int(length)] for length in ordered], dtype=np.int64)
    total = int(up_to[-1])
    ranks = {name: int(np.ceil(share * total)) for name, share in QUANTILES.items()}
    edges = [2**power for power in range(max(int(ordered[-1]) - 1, 0).bit_length() + 1)]
    at_most = [int(up_to[at - 1]) if at else 0 for at in np.searchsorted(ordered, edges, side="right")]
    histogram = {str(edge): count - below for edge, count, below in zip(edges, at_most, [0, *at_most], strict=False)}
    return {
        "min": int(ordered[0]),
        "mean": round(sum(length * count for length, count in counts.items()) / total, 2),
        **{name: int(ordered[np.searchsorted(up_to, rank)]) for name, rank in ranks.items()},
        "max": int(ordered[-1]),
        "histogram": {bound: count for bound, count in histogram.items() if count},
    }


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """Read `<prefix>.json` and check its form; None where there is none.

    Raises:  DatasetError: not JSON, or not a manifest of this format.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
    except XmtfError as error:
        raise DatasetError(f"the dataset's manifest cannot be read: {error}") from error
    problem = _manifest_problem(manifest)
    if problem:
        raise DatasetError(f"{path} is not the manifest of a dataset: {problem}. Preprocess the records again.")
    return manifest


def _manifest_problem(manifest: Any) -> str | None:
    """Say what is wrong with the form of a manifest; None when nothing is."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f'it does not say "format": "{FORMAT}"'
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"its format version is {manifest.get('format_version')!r}, this program knows {FORMAT_VERSION}"
    if manifest.get("kind") not in list(HALVES):
        return f"kind {manifest.get('kind')!r} is none of {', '.join(HALVES)}"
    if not isinstance(manifest.get("num_examples"), int):
        return "num_examples is not a whole number"
    tokenizer = manifest.get("tokenizer", "")
    if tokenizer is not None and not (
        isinstance(tokenizer, dict)
        and isinstance(tokenizer.get("fingerprint"), str)
        and all(isinstance(tokenizer.get(key), int) for key in ("vocab_size", "eos_id"))
    ):
        return "tokenizer lacks fingerprint, vocab_size or eos_id"
    columns, files = manifest.get("columns"), manifest.get("files")
    if not isinstance(columns, dict) or not all(
        name in COLUMNS and isinstance(entry, dict) and isinstance(entry.get("names"), list)
        for name, entry in columns.items()
    ):
        return "columns do not have names"
    documents = manifest.get("documents", False)
    if not isinstance(documents, bool):
        return "documents is neither true nor false"
    expected = expected_files(manifest["kind"], has_columns=bool(columns) or documents)
    if not isinstance(files, dict) or set(files) != expected:
        return f"its files are not {', '.join(sorted(expected))}"
    if not all(
        isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str)
        for e in files.values()
    ):
        return "a file lacks bytes or sha256"
    return None


def find_kind(prefix: Path, manifest: dict[str, Any] | None) -> Kind:
    """Return the kind of the dataset at `prefix`: the manifest's, or without one what its files are named.

    Raises:  DatasetError: nothing there, both kinds there, or an unfinished run.
    """
    if manifest is not None:
        return manifest["kind"]
    unfinished = list(unfinished_directories(prefix))
    found: list[Kind] = [
        kind for kind, halves in HALVES.items() if any(dataset_file(prefix, f"{half}.idx").exists() for half in halves)
    ]
    if unfinished and (not found or any((directory / COMMITTING).exists() for directory in unfinished)):
        raise DatasetError(
            f"{prefix} is unfinished: a run that writes it was interrupted or is still going ({unfinished[0].name}), "
            "and there is no manifest. Run it again."
        )
    if len(found) == 2:
        raise DatasetError(f"{prefix} has both pairs and text but no manifest that says which; move one of them away.")
    if not found:
        raise DatasetError(
            f"no dataset at {prefix}: neither {manifest_path(prefix).name} nor "
            f"{dataset_file(prefix, 'inputs_document.idx').name} exists in {prefix.parent}. Give the prefix that "
            "`xmtf preprocess --output-prefix` was given."
        )
    return found[0]


def verify_sizes(prefix: Path, manifest: dict[str, Any]) -> None:
    """Compare the size of each file with the manifest.

    Raises:  DatasetError: a file is missing or has another size.
    """
    for name, entry in manifest["files"].items():
        path = dataset_file(prefix, name)
        if not path.is_file():
            raise DatasetError(f"{path} is missing, but {manifest_path(prefix)} lists it; copy the whole dataset.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DatasetError(
                f"{path} is {size} bytes, but {manifest_path(prefix).name} says {entry['bytes']}: it is cut off or "
                "belongs to another dataset. Copy it again or preprocess the records again."
            )
