"""Run a render job: part after part into one directory, from where an earlier run stopped, and sum it up.

    rendered/
      zh/xp3_xcopa_zh_validation_ask.jsonl ...     the files of the parts, each one whole
      summary.json                                 every part with its counts, every file with its sha256
      .render/<key>.json                           one for each part: begun, or finished with its entry of the summary
      .render/lock                                 held while a job runs

A part whose key is that of a finished one, with all its files at their sizes, is kept. Files of a part that is no
longer in the job are an error, or, with `overwrite`, removed: a mixture that reads the directory must not find them.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import read_json, safe_child, write_json
from megatron_xmtf.prompts.jobs.part_files import render_part, summary_of
from megatron_xmtf.prompts.jobs.render_job import RenderJob
from megatron_xmtf.prompts.jobs.render_parts import RenderPart

__all__ = ["JobSummary", "run_render_job", "summary_table"]

STATE_DIRECTORY = ".render"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class JobSummary:
    """What a job has made."""

    output_directory: Path
    values: dict[str, Any]
    """The content of summary.json, the same whether the job ran in one go or not."""
    kept_files: int
    """Files that an earlier run had finished."""
    rendered_files: int


def run_render_job(
    job: RenderJob,
    parts: list[RenderPart],
    *,
    output_directory: Path,
    workers: int,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    on_part: Callable[[RenderPart], None] | None = None,
) -> JobSummary:
    """Render the parts that are not finished, and write the summary.

    Args:    on_bytes: bytes of the sources consumed since the last call. on_part: called as each part begins.
    Raises:  ConfigError: the directory holds files of another job, or another process renders into it.
             RecordError, TemplateError: as `render_part`; the parts before are finished and will be kept.
    """
    state = output_directory / STATE_DIRECTORY
    state.mkdir(parents=True, exist_ok=True)
    with _locked(state / "lock", output_directory):
        keys = [part.key() for part in parts]
        _clear_others(output_directory, dict(zip(keys, parts, strict=True)), overwrite=overwrite)
        entries, kept = [], 0
        for part, key in zip(parts, keys, strict=True):
            entry = _finished(output_directory, state / f"{key}.json")
            if entry is None:
                if on_part is not None:
                    on_part(part)
                write_json(state / f"{key}.json", {"files": list(part.files), "summary": None})
                done = render_part(part, output_directory=output_directory, workers=workers, on_bytes=on_bytes)
                entry = summary_of(part, done)
                write_json(state / f"{key}.json", {"files": list(part.files), "summary": entry})
            else:
                kept += _num_files(entry)
            entries.append(entry)
        values = {
            "name": job.name,
            "seed": job.seed,
            "files": sum(_num_files(entry) for entry in entries),
            "records": sum(entry["records"] for entry in entries),
            "parts": entries,
        }
        write_json(output_directory / SUMMARY, values)
    return JobSummary(output_directory, values, kept, values["files"] - kept)


@contextmanager
def _locked(path: Path, output_directory: Path) -> Generator[None, None, None]:
    with open(path, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process renders into {output_directory}; wait for it, or name another directory."
            ) from error
        yield


def _finished(output_directory: Path, path: Path) -> dict[str, Any] | None:
    """Return a part's entry of the summary if it is finished and all its files are there."""
    if not path.exists():
        return None
    entry: dict[str, Any] | None = read_json(path)["summary"]
    if entry is None:
        return None
    for template in entry["templates"]:
        if template["file"] is not None:
            file = safe_child(output_directory, template["file"])
            if not file.is_file() or file.stat().st_size != template["bytes"]:
                return None
    return entry


def _clear_others(output_directory: Path, parts: dict[str, RenderPart], *, overwrite: bool) -> None:
    """Refuse, or remove, files that are not those of this job's parts, begun or finished."""
    states = {path.stem: path for path in sorted((output_directory / STATE_DIRECTORY).glob("*.json"))}
    own = {file for key in parts if key in states for file in parts[key].files}
    others = {key: path for key, path in states.items() if key not in parts}
    foreign = {file for path in others.values() for file in read_json(path)["files"]} - own
    foreign |= {file for part in parts.values() for file in part.files} - own
    found = sorted(file for file in foreign if safe_child(output_directory, file).exists())
    if found and not overwrite:
        raise ConfigError(
            f"{output_directory} holds {len(found)} files of another job, or of this one before its templates, "
            f"settings or sources changed, {found[0]} first; name another --output-directory, or say --overwrite to "
            "render them anew and remove those that this job has not."
        )
    for file in found:
        safe_child(output_directory, file).unlink()
    for path in others.values():
        path.unlink()


def _num_files(entry: dict[str, Any]) -> int:
    return sum(template["file"] is not None for template in entry["templates"])


def summary_table(values: dict[str, Any]) -> str:
    """Lay out a summary: a part a line, what needs attention below.

    dataset  config  split       language      rows  templates  records  left out
    xcopa    et      validation  et             100         17    1,700         0
    """
    heads = ("dataset", "config", "split", "language", "rows", "templates", "records", "left out", "not rendered")
    lines, remarks = [], []
    for entry in values["parts"]:
        counts = [template["counts"] for template in entry["templates"]]
        left_out = sum(one["left_out"] for one in counts)
        missed = sum(entry["rows"] - one["rendered"] - one["left_out"] for one in counts)
        numbers = (entry["rows"], len(counts), entry["records"], left_out, missed)
        texts = [str(entry[name] or "-") for name in ("dataset", "config", "split", "language")]
        lines.append([*texts, *(f"{number:,}" for number in numbers)])
        remarks += _remarks(entry)
    totals = [f"{values['files']:,} files", "", "", "", "", "", f"{values['records']:,}", "", ""]
    table = [list(heads), *lines, totals]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    laid_out = [
        "  ".join(text.ljust(width) if column < 4 else text.rjust(width) for column, (text, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]
    return "\n".join([line.rstrip() for line in laid_out] + [f"  {remark}" for remark in remarks])


def _remarks(entry: dict[str, Any]) -> list[str]:
    where = f"{entry['dataset']} ({entry['language']})"
    remarks = []
    if entry["missing_localised"]:
        instead = "English ones are taken" if entry["templates"] else "nothing is rendered (missing: skip)"
        remarks.append(f"{where}: no template is worded in {entry['prompt_language']!r}; {instead}")
    if entry["left_out_rows"]:
        remarks.append(f"{where}: {entry['left_out_rows']:,} rows have other values than `where` asks for")
    if entry["rejected_rows"]:
        rejected = ", ".join(f"{reason} ({count:,}x)" for reason, count in entry["rejected_rows"].items())
        remarks.append(f"{where}: rows that cannot be read: {rejected}")
    for template in entry["templates"]:
        counts, name = template["counts"], f"{where}: {template['template']}"
        if counts["undefined"]:
            remarks.append(f"{name}: undefined and rendered empty: {', '.join(counts['undefined'])}")
        if counts["short_of_exemplars"]:
            remarks.append(f"{name}: {counts['short_of_exemplars']:,} records have fewer exemplars than asked")
        remarks += [f"{where}: {text}" for text in (counts["rejected"], counts["first_failure"]) if text]
    return remarks
