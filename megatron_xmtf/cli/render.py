"""`xmtf render`: rows x templates -> prompted records, into one file or, by a job, into many."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xmtf.errors import ConfigError, ExitCode, TemplateError
from megatron_xmtf.files import atomic_write, require_file, write_json
from megatron_xmtf.progress import Progress

if TYPE_CHECKING:
    from megatron_xmtf.prompts import RenderReport, RowReport, Source, Template
    from megatron_xmtf.prompts.rendering.chunk_renderer import OnError

HELP = "Render rows of a dataset with prompt templates into prompted records (jsonl)."

EXAMPLE = """  xmtf render --source val.et.jsonl val.sw.jsonl --templates xcopa.yaml --split val --output xcopa.jsonl
  xmtf render --source train.tsv --quoting csv --field id=index_id --language swh_Latn \\
      --templates sib200.yaml --template topic_of_text_en --output sib200_swh.jsonl --limit 100
  xmtf render --job job.yaml --output-directory rendered --workers 8
(docs/rendering.md has a worked job)"""

NOT_OF_JOBS = (
    *("source", "templates", "output", "template", "format", "columns", "delimiter", "quoting", "records_at"),
    *("dataset", "config", "split", "language", "task", "seed", "limit"),
)
"""Options of the plain form, whose place in a job is the job file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--source", nargs="+", action="extend", metavar="S", help="files of rows")
    parser.add_argument("--templates", metavar="T.yaml", help="promptsource's form or ours")
    parser.add_argument("--output", metavar="F.jsonl", help="also F.jsonl.counts.json is written")
    parser.add_argument("--template", nargs="+", action="extend", metavar="NAME", help="only these (default: all)")
    job = parser.add_argument_group("a job, instead of these")
    job.add_argument("--job", metavar="JOB.yaml", help="many sources, languages and variants")
    job.add_argument("--output-directory", metavar="DIR", help="default: what the job says")
    reading = parser.add_argument_group("how the source is read")
    reading.add_argument("--format", metavar="FORMAT", help="of docs/sources.md (default: by the file's suffix)")
    reading.add_argument(
        "--field", nargs="+", action="extend", default=[], metavar="NEW=OLD", help="rename a field, as id=index_id"
    )
    reading.add_argument("--columns", metavar="A,B,...", help="column names of a csv or tsv file without a header")
    reading.add_argument("--delimiter", help="of csv and tsv (default: comma, tab)")
    reading.add_argument("--quoting", choices=["csv", "none"], help="whether double quotes enclose fields")
    reading.add_argument("--records-at", metavar="KEY.KEY", help="where the list lies in a json document")
    records = parser.add_argument_group("what the records say of themselves (default: the row's or template's own)")
    for name in ("dataset", "config", "split", "language", "task"):
        records.add_argument(f"--{name}", metavar=name.upper())
    parser.add_argument("--seed", type=int, help="of templates that choose at random (default: 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="read at most N rows")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; the bytes are the same")
    parser.add_argument("--skip-errors", action="store_true", help="count rows and templates that fail, and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Render, write, print the counts."""
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: at least one process renders.")
    if arguments.job is not None:
        return _run_job(arguments)
    for name in ("source", "templates", "output"):
        if not getattr(arguments, name):
            raise ConfigError(f"--{name} is missing; give --source, --templates and --output, or a --job.")
    if arguments.output_directory is not None:
        raise ConfigError("--output-directory is an option of --job; name the file by --output.")
    return _run_files(arguments)


def _run_job(arguments: argparse.Namespace) -> int:
    from megatron_xmtf.prompts.jobs.job_run import run_render_job, summary_table
    from megatron_xmtf.prompts.jobs.render_job import load_render_job
    from megatron_xmtf.prompts.jobs.render_parts import plan_parts
    from megatron_xmtf.prompts.source_rows import size_of_sources

    for name in NOT_OF_JOBS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is not an option of a job; the job file says it.")
    if arguments.field:
        raise ConfigError("--field is not an option of a job; the job file's `source: {fields: ...}` says it.")
    path = Path(arguments.job)
    job = load_render_job(path)
    if arguments.skip_errors:
        entries = [entry.model_copy(update={"on_error": "skip"}) for entry in job.entries]
        job = job.model_copy(update={"entries": entries})
    if arguments.output_directory is not None:
        output = Path(arguments.output_directory)
    elif job.output_directory is not None:
        output = path.parent / job.output_directory
    else:
        raise ConfigError(f"{path} names no output_directory; add it, or say --output-directory.")
    parts = plan_parts(job, directory=path.parent, job_name=str(path))
    size_kib = sum(size_of_sources(part.sources) for part in parts) >> 10
    with Progress("render", total=size_kib, unit="KiB") as progress:
        summary = run_render_job(
            job,
            parts,
            output_directory=output,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            on_bytes=_kib_counter(progress),
            on_part=lambda part: progress.note(part.name),
        )
    if arguments.json:
        told = {"output_directory": str(output), "kept_files": summary.kept_files}
        told |= {"rendered_files": summary.rendered_files, **summary.values}
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        print(summary_table(summary.values))
        kept = f", {summary.kept_files:,} of them finished before" if summary.kept_files else ""
        print(f"{output}: {summary.values['records']:,} records in {summary.values['files']:,} files{kept}")
    return int(ExitCode.DONE)


def _run_files(arguments: argparse.Namespace) -> int:
    from megatron_xmtf.prompts import RenderReport, RowReport, load_templates, select_templates
    from megatron_xmtf.prompts.source_rows import size_of_sources

    output = Path(arguments.output)
    counts_path = output.with_name(output.name + ".counts.json")
    for path in (output, counts_path):
        if path.exists() and not arguments.overwrite:
            raise ConfigError(f"{path} exists already and is not overwritten; say --overwrite or name another output.")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: at least one row must be read.")
    sources = [_source(name, arguments) for name in arguments.source]
    templates = load_templates(arguments.templates)
    if arguments.template:
        templates = select_templates(templates, arguments.template)
    report, rows_read = RenderReport(), RowReport()
    with Progress("render", total=size_of_sources(sources) >> 10, unit="KiB") as progress:
        without_language = _write(arguments, sources, templates, report, rows_read, progress)
    counts = {**report.to_json(), "rejected_rows": rows_read.to_json()["rejected"]}
    write_json(counts_path, counts)
    if arguments.json:
        print(json.dumps({"output": str(output), **counts}, ensure_ascii=False, indent=2))
        return int(ExitCode.DONE)
    print(f"{output}: {report.rendered:,} records from {report.rows:,} rows x {len(templates)} templates")
    print(report.table())
    for reason, example in rows_read.examples.items():
        print(f"  rows that cannot be read: {rows_read.rejected[reason]:,} ({reason}); the first: {example}")
    if without_language:
        print(f"  {without_language:,} records name no language: per-language figures need it; say --language")
    return int(ExitCode.DONE)


def _write(
    arguments: argparse.Namespace,
    sources: list[Source],
    templates: list[Template],
    report: RenderReport,
    rows_read: RowReport,
    progress: Progress,
) -> int:
    """Render into the output, fill the reports, and return how many records name no language."""
    from megatron_xmtf.prompts.rendering.chunk_renderer import RenderPlan
    from megatron_xmtf.prompts.rendering.render import count_templates
    from megatron_xmtf.prompts.rendering.render_processes import render_chunks
    from megatron_xmtf.prompts.rendering.row_chunks import chunk_rows
    from megatron_xmtf.prompts.source_rows import identified_rows
    from megatron_xmtf.prompts.templates.variants import PosedTemplate

    on_error: OnError = "skip" if arguments.skip_errors else "raise"
    metadata = {name: getattr(arguments, name) for name in ("dataset", "config", "split", "language", "task")}
    posed = tuple(PosedTemplate(template) for template in templates)
    plan = RenderPlan(posed, arguments.seed or 0, metadata=metadata, on_error=on_error)
    totals = count_templates(plan, report)
    without_language = 0
    rows = identified_rows(
        sources, limit=arguments.limit, on_bytes=_kib_counter(progress), on_bad_row=on_error, report=rows_read
    )
    work = ((chunk, None) for chunk in chunk_rows(rows, reject=rows_read.rejecter(on_error)))
    with (
        atomic_write(Path(arguments.output), "wb") as stream,
        closing(rows),
        closing(render_chunks(work, plan, workers=arguments.workers)) as rendered,
    ):
        for chunk in rendered:
            report.rows += chunk.rows
            for total, counts in zip(totals, chunk.counts, strict=True):
                total.add(counts)
            without_language += chunk.without_language
            stream.write(b"".join(line for _, _, line in chunk.lines))
            progress.note(f"{report.rendered:,} records")
        if not report.rendered:
            raise TemplateError(
                f"no record was rendered from {report.rows:,} rows; nothing is written.\n{report.table()}"
            )
    return without_language


def _source(name: str, arguments: argparse.Namespace) -> Source:
    from megatron_xmtf.prompts import Source
    from megatron_xmtf.prompts.source_rows import require_sources

    fields = {}
    for pair in arguments.field:
        new, separator, old = pair.partition("=")
        if not (new and separator and old):
            raise ConfigError(f"--field {pair!r} is not of the form NEW=OLD, as in id=index_id.")
        fields[new] = old
    source = Source(
        path=Path(name),
        format=arguments.format,
        fields=fields,
        columns=tuple(arguments.columns.split(",")) if arguments.columns else None,
        delimiter=arguments.delimiter,
        quoting=arguments.quoting,
        records_at=arguments.records_at,
    )
    if arguments.format != "huggingface":
        require_file(name)  # first: a pattern that matched nothing has an odd suffix too
    require_sources([source])
    return source


def _kib_counter(progress: Progress) -> Callable[[int], None]:
    """Advance a bar of KiB by bytes, carrying what is less than one KiB."""
    carried = 0

    def advance(count: int) -> None:
        nonlocal carried
        whole, carried = divmod(carried + count, 1024)
        progress.advance(whole)

    return advance
