"""`xmtf render`: rows x templates -> prompted records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import ConfigError, ExitCode, TemplateError
from megatron_xmtf.files import atomic_write, require_file, write_json
from megatron_xmtf.progress import Progress

if TYPE_CHECKING:
    from megatron_xmtf.prompts import RenderReport, Source

HELP = "Render rows of a dataset with prompt templates into prompted records (jsonl)."

EXAMPLE = """  xmtf render --source val.et.jsonl val.sw.jsonl --templates xcopa.yaml --split val --output xcopa.jsonl
  xmtf render --source train.tsv --quoting csv --field id=index_id --language swh_Latn \\
      --templates sib200.yaml --template topic_of_text_en --output sib200_swh.jsonl --limit 100"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--source", nargs="+", action="extend", required=True, metavar="S", help="files of rows")
    parser.add_argument("--templates", required=True, metavar="T.yaml", help="promptsource's form or ours")
    parser.add_argument("--output", required=True, metavar="F.jsonl", help="also F.jsonl.counts.json is written")
    parser.add_argument("--template", nargs="+", action="extend", metavar="NAME", help="only these (default: all)")
    reading = parser.add_argument_group("how the source is read")
    reading.add_argument("--format", choices=["jsonl", "json", "csv", "tsv"], help="default: by the file's suffix")
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
    parser.add_argument("--seed", type=int, default=0, help="of templates that choose at random (default: 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="read at most N rows")
    parser.add_argument("--skip-errors", action="store_true", help="count rows and templates that fail, and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Render, write, print the counts."""
    from megatron_xmtf.prompts import RenderReport, load_templates, render_identified_rows, select_templates

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
    metadata = {name: getattr(arguments, name) for name in ("dataset", "config", "split", "language", "task")}
    report = RenderReport()
    size_kib = sum(path.stat().st_size for source in sources for path in source.paths) >> 10
    with Progress("render", total=size_kib, unit="KiB") as progress, atomic_write(output) as stream:
        rows = islice(_identified_rows(sources, _kib_counter(progress)), arguments.limit)
        records = render_identified_rows(
            rows,
            templates,
            seed=arguments.seed,
            metadata=metadata,
            report=report,
            on_error="skip" if arguments.skip_errors else "raise",
        )
        without_language = 0
        for number, record in enumerate(records):
            without_language += record.language is None
            stream.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")
            if number % 1024 == 0:
                progress.note(f"{number:,} records")
        if not report.rendered:
            raise TemplateError(
                f"no record was rendered from {report.rows:,} rows; nothing is written.\n{_table(report)}"
            )
    write_json(counts_path, report.to_json())
    if arguments.json:
        print(json.dumps({"output": str(output), **report.to_json()}, ensure_ascii=False, indent=2))
    else:
        print(f"{output}: {report.rendered:,} records from {report.rows:,} rows x {len(templates)} templates")
        print(_table(report))
        if without_language:
            print(f"  {without_language:,} records name no language: per-language figures need it; say --language")
    return int(ExitCode.DONE)


def _source(name: str, arguments: argparse.Namespace) -> Source:
    from megatron_xmtf.prompts import Source

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
    require_file(Path(name))  # first: a pattern that matched nothing has an odd suffix too
    source.resolved_format()
    return source


def _identified_rows(sources: list[Source], on_bytes: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows with their ids: the field `id`, else file name and number."""
    from megatron_xmtf.prompts import read_rows

    names = [source.paths[0].name for source in sources]
    for source in sources:
        name = source.paths[0].name
        label = name if names.count(name) == 1 else f"{source.paths[0].parent.name}/{name}"
        for number, row in enumerate(read_rows(source, on_bytes=on_bytes)):
            yield str(row["id"]) if "id" in row else f"{label}:{number}", row


def _kib_counter(progress: Progress) -> Callable[[int], None]:
    """Advance a bar of KiB by bytes, carrying what is less than one KiB."""
    carried = 0

    def advance(count: int) -> None:
        nonlocal carried
        whole, carried = divmod(carried + count, 1024)
        progress.advance(whole)

    return advance


def _table(report: RenderReport) -> str:
    """Lay out the counts, one template a line, and what needs attention below."""
    columns = ("rendered", "blank", "no_input", "no_target", "failed")
    width = max(len("template"), *(len(name) for name in report.templates))
    lines = [f"{'template':<{width}}" + "".join(f"{column:>11}" for column in columns)]
    remarks = []
    for name, counts in report.templates.items():
        lines.append(f"{name:<{width}}" + "".join(f"{getattr(counts, column):>11,}" for column in columns))
        if counts.undefined:
            listed = ", ".join(f"{field} ({count:,}x)" for field, count in counts.undefined.most_common(5))
            remarks.append(f"{name}: undefined and rendered empty: {listed}")
        if counts.target_not_in_choices:
            remarks.append(f"{name}: {counts.target_not_in_choices:,} targets are not among the answer choices")
        remarks += [text for text in (counts.rejected, counts.first_failure) if text]
    return "\n".join(lines + [f"  {remark}" for remark in remarks])
