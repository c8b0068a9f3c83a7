"""Tokenise records once, into a dataset of memory-mapped files.

records (.jsonl, .gz, .zst)  ->  chunks of lines  ->  workers: parse, tokenise  ->  one writer, in input order

The files have the same bytes for any number of workers, and exist whole or not at all. A run that was stopped or
killed goes on where it was, with the same bytes in the end: `data.example_writer` tells how.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from megatron_xmtf import __version__
from megatron_xmtf.data.dataset_manifest import Kind
from megatron_xmtf.data.encode import ChunkEncoder, EncodedChunk, EncodeSettings, encode_chunks
from megatron_xmtf.data.example_writer import ExampleDatasetWriter
from megatron_xmtf.data.indexed_dataset import token_dtype
from megatron_xmtf.data.journal import input_identity
from megatron_xmtf.data.line_chunks import read_files
from megatron_xmtf.data.records import InputPosition, RecordFormat
from megatron_xmtf.data.segment_rule import NoSegments
from megatron_xmtf.data.stop_signals import StoppedError, StopSignals
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, DatasetError, ExitCode, RankFailedError, RecordError, XmtfError
from megatron_xmtf.files import require_file
from megatron_xmtf.progress import Progress

__all__ = ["preprocess"]

logger = logging.getLogger(__name__)
MEGABYTE = 10**6
RECORD_SECONDS = 30.0
"""Work that is lost at most when a run is killed; a record costs a flush of what was written since the last."""


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
    restart: bool = False,
    record_seconds: float = RECORD_SECONDS,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tokenise the records of `inputs`, in their order, into a dataset at `output_prefix`.

    An interrupted run of the same inputs, tokenizer and settings is gone on from; `workers`, `on_bad_record` and the
    spelling of paths may be others.

    Args:    tokenizer: loaded, or its directory. workers: processes that tokenise; 1 works in this process.
             kind: "pairs" (inputs and targets) or "text". record_format, field_map: `data.records`.
             target_prefix: put before every target; " " as BLOOMZ. on_bad_record: "skip" counts malformed lines.
             overwrite: replace a dataset at `output_prefix` when the new one is whole.
             restart: throw away the work of an interrupted run. record_seconds: time between records of the state.
    Returns: the manifest, as written to `<output_prefix>.json`. read == kept + empty_* + malformed.
    Raises:  RecordError: a malformed line, no example kept, an input changed meanwhile. MissingError, TokenizerError,
             ConfigError. DatasetError: there is a dataset already, another run is writing it, or an interrupted run
             that was not this one left its work. StoppedError: Ctrl-C or SIGTERM. RankFailedError: a worker killed.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} is not a number of processes; use 1 or more.")
    paths = [require_file(path) for path in inputs]
    if not paths:
        raise ConfigError("no input files; give one or more .jsonl, .jsonl.gz or .jsonl.zst files.")
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
    if isinstance(tokenizer.segment_rule, NoSegments):
        logger.warning("texts are encoded whole, with the same ids but more slowly: %s", tokenizer.segment_rule.reason)
    identities = [input_identity(path) for path in paths]
    writer = ExampleDatasetWriter(
        output_prefix,
        kind=kind,
        dtype=token_dtype(tokenizer.vocab_size),
        overwrite=overwrite,
        key=_run_key(identities, tokenizer, settings),
        restart=restart,
    )
    with StopSignals() as signals, writer:
        if writer.committed is not None:
            return writer.committed  # killed while renaming, the last thing a run does
        run = _Run(writer, signals, record_seconds=record_seconds)
        run.refuse_skipped(settings)
        try:
            total = sum(identity["bytes"] for identity in identities)
            chunks = read_files(paths, start=run.position, on_block=signals.check)
            encoded_chunks = encode_chunks(chunks, tokenizer=tokenizer, settings=settings, workers=workers)
            with closing(encoded_chunks):
                run.write_all(encoded_chunks, total_bytes=total, show_progress=show_progress)
            changed = [str(path) for path, was in zip(paths, identities, strict=True) if input_identity(path) != was]
            if changed:
                writer.forget()
                raise RecordError(
                    f"{', '.join(changed)} changed while this run read it; nothing was written. "
                    "Run again when it is whole."
                )
            if not run.counts["kept"]:
                writer.forget()
                raise RecordError(
                    f"no example was kept of {run.counts['read']} records in {', '.join(map(str, paths))} "
                    f"({_reasons(run.counts) or 'the files are empty'}); nothing was written."
                )
            return writer.commit(_facts(tokenizer, settings, identities, run.counts))
        except (StoppedError, RankFailedError) as error:
            run.record()
            # A signal to all processes may have killed a worker that was only starting.
            raise run.explained(signals.error or error) from error.__cause__
        except XmtfError as error:
            raise run.explained(error) from error.__cause__


class _Run:
    """Where one run stands: its position and counts, and when they were recorded."""

    def __init__(self, writer: ExampleDatasetWriter, signals: StopSignals, *, record_seconds: float) -> None:
        self._writer, self._signals, self._record_seconds = writer, signals, record_seconds
        progress = writer.progress or {"position": {}, "counts": {}}
        self.position = InputPosition(**progress["position"])
        self.counts: Counter[str] = Counter(progress["counts"])
        self._recorded_at = time.monotonic()
        self._unrecorded = False
        self._resumed = writer.progress is not None
        if self._resumed:
            logger.warning(
                "going on from an interrupted run, at line %s of input file %s; %s records were read already",
                f"{self.position.line:,}",
                self.position.file + 1,
                f"{self.counts['read']:,}",
            )

    def refuse_skipped(self, settings: EncodeSettings) -> None:
        """Raise DatasetError where the interrupted run left out lines that this one is to stop at."""
        malformed = sum(count for name, count in self.counts.items() if name.startswith("malformed/"))
        if settings.on_bad_record == "error" and malformed:
            raise DatasetError(
                f"the interrupted run left out {malformed} malformed lines, and this one is to stop at the first; "
                "give --on-bad-record skip again, or --restart to begin anew."
            )

    def write_all(self, encoded_chunks: Iterable[EncodedChunk], *, total_bytes: int, show_progress: bool) -> None:
        """Write chunk after chunk, recording the state now and then.

        Raises:  StoppedError: a signal came.
        """
        done = self.position.bytes_read // MEGABYTE
        total = -(-total_bytes // MEGABYTE)
        read_before, started = self.counts["read"], time.monotonic()
        name = "preprocess (continued)" if self._resumed else "preprocess"
        with Progress(name, total=total, unit="MB", done=done, enabled=show_progress) as progress:
            for encoded in encoded_chunks:
                self._writer.add(encoded.halves, encoded.columns, documents=encoded.documents)
                self.counts.update(encoded.counts)
                self.position = encoded.position
                self._unrecorded = True
                if time.monotonic() - self._recorded_at >= self._record_seconds:
                    self.record()
                rate = (self.counts["read"] - read_before) / max(time.monotonic() - started, 1e-9)
                progress.note(f"{rate:,.0f} records/s")
                progress.advance(self.position.bytes_read // MEGABYTE - progress.done)
                self._signals.check()
        if self._writer.kept_at is not None:
            self.record()  # hashing and packing the files of a long run takes minutes too

    def record(self) -> None:
        """Record the state, if anything was written since the last time."""
        if self._unrecorded:
            self._writer.record({"position": asdict(self.position), "counts": dict(self.counts)})
            self._recorded_at, self._unrecorded = time.monotonic(), False

    def explained(self, error: XmtfError) -> XmtfError:
        """Say in an error what is kept; a run that was stopped and can go on ends with exit code 3."""
        kept = self._writer.kept_at
        stopped = isinstance(error, StoppedError)
        if kept is None:
            error.args = (f"{error} Nothing was written.",) if stopped else error.args
            return error
        progress = self._writer.progress
        assert progress is not None, "what is kept has a record"
        error.args = (
            f"{error} The work on the first {progress['counts'].get('read', 0):,} records is kept in {kept}: "
            "the same command goes on from there, --restart begins anew.",
        )
        if stopped:
            error.exit_code = ExitCode.REQUEUE
        return error


def _run_key(identities: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, settings: EncodeSettings) -> dict[str, Any]:
    """Return everything that the bytes of the dataset depend on, as JSON has it."""
    own = {"tokenizer_directory", "on_bad_record", "field_map"}
    return {
        "inputs": list(identities),
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "field_map": dict(settings.field_map),
        **{name: value for name, value in asdict(settings).items() if name not in own},
        "program_version": __version__,
    }


def _facts(
    tokenizer: Tokenizer, settings: EncodeSettings, identities: Sequence[Mapping[str, Any]], counts: Counter[str]
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
        "segments": asdict(tokenizer.segment_rule),
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
        "sources": [{"path": identity["path"], "bytes": identity["bytes"]} for identity in identities],
    }


def _reasons(counts: Counter[str]) -> str:
    names = sorted(name for name in counts if name.startswith(("empty", "malformed")))
    return ", ".join(f"{name.replace('malformed/', '').replace('_', ' ')}: {counts[name]}" for name in names)
