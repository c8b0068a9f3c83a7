"""Read Hugging Face datasets: a directory made by `save_to_disk`, a directory of data files, or a dataset on the hub.

    what lies in the directory       how it is read
    state.json (one split)           its Arrow files, one batch of rows at a time, by us
    dataset_dict.json (splits)       the split's directory, likewise
    data files (.parquet, ...)       by the `datasets` library, streamed: split and configuration as on the hub

Rows are JSON values by the rules of `arrow_values.py`; a ClassLabel is its number. No code of a dataset ever runs:
`datasets` must be of version 4 or later, which has no loading scripts, and only its readers of json, csv, parquet,
arrow and text are let in. A directory's own README may name its data files, but none outside of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from megatron_xmtf.errors import ConfigError, RecordError, nearest_names
from megatron_xmtf.files import read_json, require_file, safe_child
from megatron_xmtf.prompts.readers.arrow_values import batch_rows, check_schema
from megatron_xmtf.prompts.readers.bad_rows import LocatedRows, Reject
from megatron_xmtf.prompts.readers.extras import needs_extra
from megatron_xmtf.prompts.sources import Source

__all__ = ["read_huggingface"]

OnBytes = Callable[[int], None]
READERS = ("arrow", "csv", "json", "parquet", "text")
"""Packaged readers of the `datasets` library that only read; others load pickles, archives or media."""
BATCH_ROWS = 256


def read_huggingface(source: Source, reject: Reject, *, on_bytes: OnBytes | None) -> LocatedRows:
    """Read the rows of a dataset, in its order; `on_bytes` is called for saved datasets alone.

    Raises:  ConfigError: no such dataset, split or configuration, several and none declared, a dataset that needs
             another reader, no network. RecordError: damaged. MissingError: a saved dataset lacks a file.
    """
    if source.hub is None:
        (directory,) = source.paths
        if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
            if source.name is not None:
                raise ConfigError(f"{directory} is a saved dataset, which has no configurations; drop name.")
            return _saved_rows(_saved_split(directory, source.split), source.columns, reject, on_bytes)
    return _streamed_rows(source, reject)


def _saved_split(directory: Path, split: str | None) -> Path:
    """Return the directory of one split of what `save_to_disk` made."""
    if (directory / "dataset_dict.json").is_file():
        splits = _object(directory / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise RecordError(f"{directory / 'dataset_dict.json'} lists no splits.")
        return safe_child(directory, _chosen_split(str(directory), splits, split))
    own = _object(directory / "state.json").get("_split")
    if split is not None and split != own:
        raise ConfigError(f"{directory} holds the split {own!r}, not {split!r}; declare that, or none.")
    return directory


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise RecordError(f"{path} holds a {type(value).__name__}; save_to_disk writes an object.")
    return value


def _chosen_split(label: str, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise ConfigError(f"{label} has the splits {', '.join(splits)}; declare split: one of them.")
    if split not in splits:
        raise ConfigError(f"{label} has no split {split!r}; {nearest_names(split, splits)}.")
    return split


def _saved_rows(
    directory: Path, columns: Sequence[str] | None, reject: Reject, on_bytes: OnBytes | None
) -> LocatedRows:
    state = _object(require_file(directory / "state.json"))
    if state.get("_indices_data_files"):
        raise ConfigError(f"{directory} was saved with an index beside its rows; save it anew (flatten_indices).")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in files
    ):
        raise RecordError(f"{directory / 'state.json'} lists no data files.")
    for entry in files:
        path = require_file(safe_child(directory, entry["filename"]))
        reported = number = 0
        for batch, position in _arrow_batches(path):
            names = check_schema(batch.schema, columns, str(directory))
            yield from batch_rows(batch.select(names), str(path), number, reject)
            number += batch.num_rows
            if on_bytes is not None:
                on_bytes(position - reported)
                reported = position


def _arrow_batches(path: Path) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield (batch, where in the file it ends); checked in full, since offsets in the file are taken at their word."""
    try:
        # Mapped: a length out of the file that is beyond its end fails, and no memory is asked for.
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                batch.validate(full=True)
                yield batch, file.tell()
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path} is no Arrow stream, or is damaged or cut off ({error}).") from error


def _streamed_rows(source: Source, reject: Reject) -> LocatedRows:
    with ExitStack() as stack:
        tables = _guarded(_opened(source, stack), source)
        number, schema, names = 0, None, []
        for table in tables:
            if table.schema != schema:
                schema = table.schema
                names = check_schema(schema, source.columns, source.label)
            for batch in table.select(names).to_batches():
                yield from batch_rows(batch, source.label, number, reject)
                number += batch.num_rows


def _guarded(tables: Iterator[pa.Table], source: Source) -> Iterator[pa.Table]:
    while True:
        try:
            table = next(tables)
        except StopIteration:
            return
        except Exception as error:  # whatever a reader of the library raises on a damaged file
            raise RecordError(f"{source.label} cannot be read on: {type(error).__name__}: {error}") from error
        yield table


def _opened(source: Source, stack: ExitStack) -> Iterator[pa.Table]:
    """Open a dataset for streaming and choose its split."""
    with needs_extra(source.label, "a Hugging Face dataset"):
        import datasets

    if int(metadata.version("datasets").split(".")[0]) < 4:
        raise ConfigError(
            f"datasets {metadata.version('datasets')} runs code that comes with a dataset; install 4 or later "
            "(pip install -U 'megatron_xmtf[datasets]')."
        )
    if source.hub is None:
        (directory,) = source.paths
        _refuse_foreign_names(directory)
        # An absolute name: a relative one could be taken for the name of a dataset, or of a reader.
        origin, cache = str(directory.resolve()), stack.enter_context(tempfile.TemporaryDirectory(prefix="xmtf-"))
    else:
        origin, cache = _hub_id(source.hub), None
    try:
        builder = datasets.load_dataset_builder(origin, source.name, revision=source.revision, cache_dir=cache)
    except Exception as error:  # network, library and format errors of a dozen types
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        remedy = (
            f"; the hub must be reached{offline}, or download it where it can be (hf download --repo-type dataset "
            f"{source.hub}) and declare path"
            if source.hub
            else ""
        )
        raise ConfigError(
            f"{source.label} cannot be opened: {type(error).__name__}: {_one_line(error)}{remedy}."
        ) from error
    _check_builder(builder, source)
    split = _chosen_split(source.label, list(builder.config.data_files or {}), source.split)
    stream = builder.as_streaming_dataset(split=split)
    return iter(stream.with_format("arrow").iter(batch_size=BATCH_ROWS))


def _hub_id(hub: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub):
        raise ConfigError(f"hub={hub!r} is not of the form owner/name.")
    if Path(hub).exists():
        raise ConfigError(f"hub={hub!r} is also a path here, which the library would read instead; declare path.")
    return hub


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_builder(builder: Any, source: Source) -> None:
    """Let in only readers that just read, and only files of the dataset itself."""
    reader = type(builder).__module__.split(".")
    module = builder.__module__.split(".")
    name = next((part for part in (module[-1], reader[-1]) if part in READERS), None)
    if name is None or module[:2] != ["datasets", "packaged_modules"]:
        raise ConfigError(
            f"{source.label} needs the reader {module[-1]!r} of `datasets`; only {', '.join(READERS)} are let in."
        )
    root = str(Path(source.paths[0]).resolve()) + os.sep if source.hub is None else f"hf://datasets/{source.hub}@"
    for files in (builder.config.data_files or {}).values():
        for file in files:
            inside = str(file) if source.hub is not None else os.path.realpath(str(file))
            if not inside.startswith(root):
                raise ConfigError(f"{source.label} names the data file {file}, outside of it; it is not read.")


def _refuse_foreign_names(directory: Path) -> None:
    """Refuse a directory whose own README names data files elsewhere, before anything looks for them."""
    for name in ("README.md", ".huggingface.yaml"):
        path = directory / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if name == "README.md":
            head = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
            text = head.group(1) if head else ""
        try:
            configs = (yaml.safe_load(text) or {}).get("configs", [])
        except (yaml.YAMLError, AttributeError) as error:
            raise ConfigError(f"{path} has a head that is not a YAML mapping: {_one_line(error)}") from error
        for found in _texts(configs):
            if "://" in found or os.path.isabs(found) or ".." in found.split("/"):
                raise ConfigError(f"{path} names {found!r}, outside of the dataset; it is not read.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for element in value.values():
            yield from _texts(element)
    elif isinstance(value, list):
        for element in value:
            yield from _texts(element)
