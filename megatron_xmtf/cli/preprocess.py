"""`xmtf preprocess`: records -> indexed files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from megatron_xmtf.errors import ConfigError, ExitCode

HELP = "tokenise records once, into memory-mapped indexed files"

EXAMPLE = """\
  xmtf preprocess --input train.jsonl --tokenizer models/bloom-560m --output-prefix data/train --workers 8
  xmtf preprocess --input en.jsonl.gz sw.jsonl.zst --tokenizer models/bloom-560m --output-prefix data/qa \\
      --field-map inputs=question targets=answer --on-bad-record skip
  xmtf preprocess --input wiki.jsonl --kind text --tokenizer models/bloom-560m --output-prefix data/wiki

a record is one JSON object a line: inputs and targets (or text), and optionally dataset, config, split, language,
template, template_language, task, and id or document (records of one document are never split apart)
a run that was stopped or killed goes on when the same command is given again; its output is the same in the end
"""

NAMES_SHOWN = 5
"""Values of a column in the report; all are in the manifest."""
FORMATS = ["records", "prompt_completion", "instruction", "messages"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xmtf preprocess`."""
    parser.add_argument("--input", nargs="+", action="extend", required=True, metavar="F", help=".jsonl, .gz or .zst")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face directory with tokenizer.json")
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="writes P_inputs_document.{bin,idx} ... and P.json"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)")
    parser.add_argument(
        "--kind", choices=["pairs", "text"], default="pairs", help="inputs and targets, or text alone (default: pairs)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="records",
        help="fields of a record; records (default): inputs, targets; instruction: instruction, input, output",
    )
    parser.add_argument(
        "--field-map", nargs="+", action="extend", default=[], metavar="FIELD=NAME", help="FIELD is called NAME here"
    )
    parser.add_argument(
        "--target-prefix", default=" ", metavar="TEXT", help='put before every target (default: " ", as BLOOMZ did)'
    )
    parser.add_argument(
        "--on-bad-record", choices=["error", "skip"], default="error", help="malformed lines: stop, or skip and count"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset at P when the new one is whole")
    parser.add_argument("--restart", action="store_true", help="throw away what an interrupted run left, begin anew")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Preprocess and report."""
    from megatron_xmtf.data.preprocess import preprocess

    started = time.monotonic()
    manifest = preprocess(
        arguments.input,
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        workers=arguments.workers,
        kind=arguments.kind,
        record_format=arguments.format,
        field_map=_field_map(arguments.field_map),
        target_prefix=arguments.target_prefix,
        on_bad_record=arguments.on_bad_record,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    if arguments.json:
        import json

        print(json.dumps(manifest, ensure_ascii=False))
    else:
        print(_word_report(manifest, arguments, seconds=time.monotonic() - started))
    return int(ExitCode.DONE)


def _field_map(entries: Sequence[str]) -> dict[str, str]:
    mapping = {}
    for entry in entries:
        field, equals, name = entry.partition("=")
        if not (field and equals and name) or field in mapping:
            raise ConfigError(f"--field-map {entry!r} is not FIELD=NAME with each FIELD once; say inputs=question.")
        mapping[field] = name
    return mapping


def _word_report(manifest: dict[str, Any], arguments: argparse.Namespace, *, seconds: float) -> str:
    counts, prefix = manifest["counts"], arguments.output_prefix
    dropped = {name.replace("_", " "): counts[name] for name in counts if name.startswith("empty")}
    dropped |= {
        f"malformed ({name.replace('_', ' ')})": count for name, count in counts["malformed_reasons"].items()
    } or {"malformed": 0}
    lines = [
        f"{counts['kept']:,} examples kept of {counts['read']:,} records ("
        + ", ".join(f"{count:,} {name}" for name, count in dropped.items())
        + ")",
        *(_column_line(name, column) for name, column in manifest["columns"].items()),
        length_table(manifest),
        f"{prefix}.json and {len(manifest['files'])} files, {manifest['dtype']}, in {seconds:.1f} s",
        f"next: xmtf inspect {prefix} --show 2 --tokenizer {arguments.tokenizer}",
    ]
    return "\n".join(lines)


def _column_line(name: str, column: dict[str, Any]) -> str:
    """Name the values of a column that most examples have: 'language    sw 4,000, en 1,200, 3 more'."""
    ordered = sorted(zip(column["counts"], column["names"], strict=True), key=lambda entry: (-entry[0], entry[1]))
    shown = [f"{value or '(none)'} {count:,}" for count, value in ordered[:NAMES_SHOWN]]
    more = [f"{len(ordered) - NAMES_SHOWN:,} more"] if len(ordered) > NAMES_SHOWN else []
    return f"{name:<18}" + ", ".join(shown + more)


def length_table(manifest: dict[str, Any]) -> str:
    """Lay out the lengths of a dataset, in tokens an example, and the tokens in all."""
    head = ["tokens", "mean", "p50", "p90", "p99", "max", "total"]
    lines = [f"{head[0]:<10}" + "".join(f"{cell:>10}" for cell in head[1:-1]) + f"{head[-1]:>16}"]
    for name, lengths in manifest["lengths"].items():
        total = manifest["tokens"].get(name, sum(manifest["tokens"].values()))
        cells = [f"{lengths['mean']:,.1f}", *(f"{lengths[key]:,}" for key in ("p50", "p90", "p99", "max"))]
        lines.append(f"  {name:<8}" + "".join(f"{cell:>10}" for cell in cells) + f"{total:>16,}")
    return "\n".join(lines)
