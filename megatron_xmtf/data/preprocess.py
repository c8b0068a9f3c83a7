"""Tokenise records once, into a dataset of memory-mapped files.

records (.jsonl, .jsonl.gz)  ->  chunks of lines  ->  workers: parse, tokenise  ->  one writer, in input order

The files have the same bytes for any number of workers, and exist whole or not at all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from megatron_xmtf.data.dataset_manifest import Kind
from megatron_xmtf.data.encode import ChunkEncoder, EncodeSettings, encode_chunks
from megatron_xmtf.data.example_writer import ExampleDatasetWriter
from megatron_xmtf.data.indexed_dataset import token_dtype
from megatron_xmtf.data.records import LineChunk, RecordFormat, read_chunks
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, RecordError
from megatron_xmtf.files import require_file
from megatron_xmtf.progress import Progress

__all__ = ["preprocess"]

MEGABYTE = 10**6


def preprocess(
    inputs: Sequence[Path | str],
    *,
    tokenizer: Tokenizer | Path | str,
    output_prefix: Path | str,
    workers: int = 1,
    kind: Kind = "pairs",
    record_format: RecordFormat = "records",
    field_map: Mapping[str, str] | None = None,
    target_prefix: str = " ",
    on_bad_record: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tokenise the records of `inputs`, in their order, into a dataset at `output_prefix`.

    Args:    tokenizer: loaded, or its directory. workers: processes that tokenise; 1 works in this process.
             kind: "pairs" (inputs and targets) or "text". record_format, field_map: `data.records`.
             target_prefix: put before every target; " " as BLOOMZ. on_bad_record: "skip" counts malformed lines.
             overwrite: replace a dataset at `output_prefix` when the new one is whole.
    Returns: the manifest, as written to `<output_prefix>.json`. read == kept + empty_* + malformed.
    Raises:  RecordError: a malformed line, or no example kept. MissingError, TokenizerError, ConfigError.
             DatasetError: there is a dataset already, or another run is writing it.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} is not a number of processes; use 1 or more.")
    paths = [require_file(path) for path in inputs]
    if not paths:
        raise ConfigError("no input files; give one or more .jsonl or .jsonl.gz files.")
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    settings = EncodeSettings(
        tokenizer_directory=tokenizer.directory,
        kind=kind,
        record_format=record_format,
        field_map=tuple(sorted((field_map or {}).items())),
        target_prefix=target_prefix,
        on_bad_record=on_bad_record,
    )
    ChunkEncoder(tokenizer, settings)  # a wrong field map is told before any process starts
    counts: Counter[str] = Counter()
    dtype = token_dtype(tokenizer.vocab_size)
    with ExampleDatasetWriter(output_prefix, kind=kind, dtype=dtype, overwrite=overwrite) as writer:
        total_bytes = sum(path.stat().st_size for path in paths)
        progress = Progress("preprocess", total=-(-total_bytes // MEGABYTE), unit="MB", enabled=show_progress)
        started = time.monotonic()
        encoded_chunks = encode_chunks(_chunks(paths), tokenizer=tokenizer, settings=settings, workers=workers)
        with progress, closing(encoded_chunks):
            for encoded in encoded_chunks:
                writer.add(encoded.halves, encoded.columns, documents=encoded.documents)
                counts.update(encoded.counts)
                rate = counts["read"] / max(time.monotonic() - started, 1e-9)
                progress.note(f"{rate:,.0f} records/s")
                progress.advance(encoded.position // MEGABYTE - progress.done)
        if not counts["kept"]:
            raise RecordError(
                f"no example was kept of {counts['read']} records in {', '.join(map(str, paths))} "
                f"({_reasons(counts) or 'the files are empty'}); nothing was written."
            )
        return writer.commit(_facts(tokenizer, settings, paths, counts))


def _facts(
    tokenizer: Tokenizer, settings: EncodeSettings, paths: Sequence[Path], counts: Counter[str]
) -> dict[str, Any]:
    malformed = {name.split("/")[1]: count for name, count in sorted(counts.items()) if name.startswith("malformed/")}
    empty = ("empty_text",) if settings.kind == "text" else ("empty_inputs", "empty_targets")
    return {
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "directory": str(tokenizer.directory),
        },
        "target_prefix": None if settings.kind == "text" else settings.target_prefix,
        "counts": {
            "read": counts["read"],
            "kept": counts["kept"],
            **{name: counts[name] for name in empty},
            "malformed": sum(malformed.values()),
            "malformed_reasons": malformed,
            "blank_lines": counts["blank_lines"],
        },
        "settings": {
            "record_format": settings.record_format,
            "field_map": dict(settings.field_map),
            "on_bad_record": settings.on_bad_record,
        },
        "sources": [{"path": str(path), "bytes": path.stat().st_size} for path in paths],
    }


def _reasons(counts: Counter[str]) -> str:
    names = sorted(name for name in counts if name.startswith(("empty", "malformed")))
    return ", ".join(f"{name.replace('malformed/', '').replace('_', ' ')}: {counts[name]}" for name in names)


def _chunks(paths: Sequence[Path]) -> Iterator[LineChunk]:
    offset = 0
    for path in paths:
        yield from read_chunks(path, offset=offset)
        offset += path.stat().st_size
