"""Render the real multilingual data with several templates a row, for benchmarks/preprocess.py.

rows of XQuAD, XCOPA, SIB-200, NTREX, NusaX, GSM8K, Flan's chains of thought, Natural Instructions, EXAMS, ...
  x  promptsource's templates, examples/templates and benchmarks/preprocess_templates.yaml
  -> rendered-200.jsonl  200 MB in the order of `xmtf render`, row by row; for less than all, some of the rows
     distinct-200.jsonl  the same, each pair of inputs and targets once
     shuffled-200.jsonl  the records of the first in a random order, as a shuffled mixture has them
  -> *.megatron.jsonl, the same records with the target prefix written out: Megatron-LM's tool adds none
"""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from megatron_xmtf.files import atomic_write
from megatron_xmtf.progress import Progress
from megatron_xmtf.prompts import Template, load_templates, parse_templates, render_rows

__all__ = ["TARGET_PREFIX", "RecordSet", "write_records"]

Row = dict[str, Any]
TARGET_PREFIX = " "
RecordSet = Literal["rendered", "distinct", "shuffled"]
SEED = 0
PROMPTSOURCE = "promptsource_templates/xp3mt/templates"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class RowSet:
    """Rows of one dataset and language, and the templates that word them."""

    dataset: str
    language: str
    rows: list[Row]
    templates: list[Template]


def write_records(directory: Path, *, data: Path, megabytes: int) -> dict[RecordSet, tuple[Path, Path]]:
    """Write three sets of about `megabytes` into `directory`, once; return each set's files, ours and Megatron's."""
    files: dict[RecordSet, tuple[Path, Path]] = {
        name: (directory / f"{name}-{megabytes}.jsonl", directory / f"{name}-{megabytes}.megatron.jsonl")
        for name in get_args(RecordSet)
    }
    if not all(path.is_file() for pair in files.values() for path in pair):
        records = _some_rows(list(_records(data)), megabytes=megabytes)
        _write(records, *files["rendered"])
        _write(list({(one["inputs"], one["targets"]): one for one in records}.values()), *files["distinct"])
        random.Random(SEED).shuffle(records)
        _write(records, *files["shuffled"])
    return files


def _some_rows(records: list[Row], *, megabytes: int) -> list[Row]:
    """Keep the share of the rows, with all their templates, that makes about the wanted size."""
    total = sum(map(len, map(_line, records)))
    share = 1.01 * megabytes * 10**6 / total
    if share > 1:
        print(f"the data and templates give {total / 1e6:.0f} MB, not {megabytes}")
    return [
        one for one in records if zlib.crc32(f"{one['dataset']}/{one['language']}/{one['id']}".encode()) < share * 2**32
    ]


def _write(records: list[Row], ours: Path, megatron: Path) -> None:
    with atomic_write(ours, "wb") as stream, atomic_write(megatron, "wb") as prefixed:
        for record in records:
            stream.write(_line(record))
            prefixed.write(_line({**record, "targets": TARGET_PREFIX + record["targets"]}))


def _line(record: Row) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _records(data: Path) -> Iterator[Row]:
    sets = list(_row_sets(data))
    with Progress("render", total=sum(len(one.rows) for one in sets), unit="rows") as progress:
        for one in sets:
            for record in render_rows(
                one.rows, one.templates, seed=SEED, dataset=one.dataset, language=one.language, on_error="skip"
            ):
                if record.inputs.strip() and record.targets.strip():
                    yield record.to_json()
            progress.advance(len(one.rows))


def _row_sets(data: Path) -> Iterator[RowSet]:
    """Lay out every dataset with its templates; a dataset in another language also gets the English ones."""
    prompts = {
        entry["set"]: parse_templates({"templates": entry["templates"]}, source=entry["set"])
        for entry in yaml.safe_load((Path(__file__).with_name("preprocess_templates.yaml")).read_text(encoding="utf-8"))
    }
    english = load_templates(data / PROMPTSOURCE / "xquad/xquad.en/templates.yaml")
    for language in ("en", "es", "ar", "zh", "hi"):
        own = load_templates(data / PROMPTSOURCE / f"xquad/xquad.{language}/templates.yaml")
        yield RowSet("xquad", language, _xquad(data, language), _merged(own, english))
    english = load_templates(data / PROMPTSOURCE / "xcopa/en/templates.yaml")
    for folder in sorted((data / "xcopa" / "data").iterdir()):
        path = data / PROMPTSOURCE / "xcopa" / folder.name / "templates.yaml"
        rows = [row for file in sorted(folder.iterdir()) for row in _jsonl(file)]
        yield RowSet("xcopa", folder.name, rows, _merged(load_templates(path) if path.exists() else [], english))
    sib = load_templates(REPOSITORY / "examples" / "templates" / "sib200.yaml")
    for folder in sorted(path for path in (data / "sib200").iterdir() if path.is_dir()):
        rows = [row for file in sorted(folder.glob("*.tsv")) for row in _table(file, delimiter="\t")]
        yield RowSet("sib200", folder.name, rows, sib)
    for name, language, rows in _further(data):
        yield RowSet(name, language, rows, prompts[_set_of(name)])


def _set_of(dataset: str) -> str:
    sets = {
        "nusax": "sentiment",
        "indonli": "sentence_pair",
        "jnli": "sentence_pair",
        "korsts": "sentence_pair",
        "exams": "multiple_choice",
        "jcommonsenseqa": "multiple_choice",
    }
    return sets.get(dataset, dataset)


def _further(data: Path) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield (dataset, language, rows) of the sets that benchmarks/preprocess_templates.yaml words."""
    for folder in sorted(path for path in (data / "nusax" / "sentiment").iterdir() if path.is_dir()):
        yield (
            "nusax",
            folder.name,
            [row for file in sorted(folder.glob("*.csv")) for row in _table(file, delimiter=",")],
        )
    for file in sorted((data / "flan_cot").glob("*.tsv")):
        cells = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        keys = ("input", "answer", "rationale")
        rows = [
            dict(zip(keys, (c.replace("\\n", "\n") for c in line), strict=True)) for line in cells if len(line) == 3
        ]
        yield "flan_cot", "en", rows
    yield "gsm8k", "en", _jsonl(data / "gsm8k" / "train.jsonl")
    for file in sorted((data / "natural_instructions").rglob("task*.json")):
        task = json.loads(file.read_text(encoding="utf-8"))
        definition = task["Definition"] if isinstance(task["Definition"], str) else task["Definition"][0]
        rows = [{"definition": definition, "input": i["input"], "output": i["output"][0]} for i in task["Instances"]]
        yield "natural_instructions", "en", rows
    texts = {
        path.name.split(".")[1]: path.read_text(encoding="utf-8").splitlines()
        for path in sorted((data / "ntrex").glob("*.txt"))
    }
    for source, target in permutations(sorted(texts), 2):
        rows = [{"source": a, "target": b} for a, b in zip(texts[source], texts[target], strict=True)]
        yield "ntrex", target, [{**row, "source_name": source, "target_name": target} for row in rows]
    yield from _pairs(data)
    yield from _exams(data)


def _pairs(data: Path) -> Iterator[tuple[str, str, list[Row]]]:
    names = {"e": "entailment", "n": "neutral", "c": "contradiction"}
    rows = _jsonl(data / "indonli" / "val.jsonl")
    yield "indonli", "id", [_pair(row["premise"], row["hypothesis"], names[row["label"]]) for row in rows]
    rows = _jsonl(data / "jglue" / "jnli-v1.3" / "valid-v1.3.json")
    yield "jnli", "ja", [_pair(row["sentence1"], row["sentence2"], row["label"]) for row in rows]
    lines = [
        line.split("\t")
        for file in sorted((data / "kornlu" / "KorSTS").glob("*.tsv"))
        for line in file.read_text(encoding="utf-8").splitlines()[1:]
    ]
    yield "korsts", "ko", [_pair(line[5], line[6], line[4]) for line in lines if len(line) == 7]
    for file in sorted((data / "jglue" / "jcommonsenseqa-v1.3").glob("*.json")):
        rows = _jsonl(file)
        options = [[row[f"choice{number}"] for number in range(5)] for row in rows]
        yield (
            "jcommonsenseqa",
            "ja",
            [
                {"question": row["question"], "options": found, "answer": found[row["label"]]}
                for row, found in zip(rows, options, strict=True)
            ],
        )


def _exams(data: Path) -> Iterator[tuple[str, str, list[Row]]]:
    by_language: dict[str, list[Row]] = {}
    for file in sorted((data / "exams" / "multilingual").glob("*.tar.gz")):
        with tarfile.open(file) as archive:
            for member in archive.getmembers():
                stream = archive.extractfile(member)
                if stream is None or not member.name.endswith(".jsonl"):
                    continue
                for line in io.TextIOWrapper(stream, encoding="utf-8"):
                    row = json.loads(line)
                    choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
                    if row["answerKey"] in choices:
                        by_language.setdefault(row["info"]["language"], []).append(
                            {
                                "question": row["question"]["stem"],
                                "options": list(choices.values()),
                                "answer": choices[row["answerKey"]],
                            }
                        )
    for language, rows in sorted(by_language.items()):
        yield "exams", language, rows


def _pair(first: str, second: str, label: str) -> Row:
    return {"first": first, "second": second, "label": label, "choices": "entailment, neutral, contradiction"}


def _xquad(data: Path, language: str) -> list[Row]:
    articles = json.loads((data / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    return [
        {
            "id": qa["id"],
            "title": article.get("title", ""),
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [a["text"] for a in qa["answers"]], "answer_start": [0]},
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


def _merged(own: list[Template], english: list[Template]) -> list[Template]:
    """Return both lists, those of the same name once."""
    return [*own, *(template for template in english if template.name not in {one.name for one in own})]


def _jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _table(path: Path, *, delimiter: str) -> list[Row]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))
