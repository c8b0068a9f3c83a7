"""Every folder of the shared data through a declared source, counted again by other means."""

import csv
import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.prompts import read_rows, source_from_mapping

Count = Callable[[Path], int]


def non_empty_lines(path: Path) -> int:
    counted = subprocess.run(["grep", "-c", ".", str(path)], capture_output=True, text=True, check=True)
    return int(counted.stdout)


def gzip_lines(path: Path) -> int:
    return gzip.decompress(path.read_bytes()).count(b"\n")


def csv_records(path: Path) -> int:
    with open(path, newline="", encoding="utf-8") as stream:
        return sum(1 for _ in csv.reader(stream, delimiter="," if path.suffix == ".csv" else "\t")) - 1


def tar_lines(path: Path) -> int:
    with tarfile.open(path) as archive:
        (member,) = archive.getmembers()
        return sum(1 for _ in io.TextIOWrapper(archive.extractfile(member), "utf-8"))


def listed(*keys: str) -> Count:
    def count(path: Path) -> int:
        value = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
        return len(value)

    return count


def squad_questions(path: Path) -> int:
    return path.read_text(encoding="utf-8").count('"question":')


FLAN_COT = ["question", "answer", "rationale"]
TABLE: dict[str, tuple[dict[str, Any], Count, dict[str, type]]] = {
    # pattern: (declaration, rows by other means, fields that each row must have)
    "bbh/bbh/*.json": ({"records_at": "examples"}, listed("examples"), {"input": str, "target": str}),
    "bbh/cot-prompts/*.txt": ({"format": "lines"}, non_empty_lines, {"text": str}),
    "exams/multilingual/*.jsonl.tar.gz": (
        {"fields": {"question": "question.stem", "choices": "question.choices.*.text", "language": "info.language"}},
        tar_lines,
        {"question": str, "choices": list, "answerKey": str, "language": str, "id": str},
    ),
    "flan_cot/*.tsv": ({"columns": FLAN_COT, "quoting": "none"}, non_empty_lines, dict.fromkeys(FLAN_COT, str)),
    "gsm8k/*.jsonl": ({"constants": {"language": "en"}}, non_empty_lines, {"question": str, "answer": str}),
    "indonli/*.jsonl": ({}, non_empty_lines, {"premise": str, "hypothesis": str, "label": str}),
    "jglue/jcommonsenseqa-v1.3/*.json": ({"format": "jsonl"}, non_empty_lines, {"q_id": int, "choice4": str}),
    "jglue/j[ns]*-v1.3/*.json": ({"format": "jsonl"}, non_empty_lines, {"sentence1": str, "sentence2": str}),
    "kornlu/KorSTS/*.tsv": (
        {"quoting": "none", "fields": {"source": "genre"}},
        lambda path: non_empty_lines(path) - 1,
        {"sentence1": str, "sentence2": str, "score": str, "source": str},
    ),
    "mgsm/*.tsv": (
        {"columns": ["question", "answer"], "quoting": "none"},
        non_empty_lines,
        {"question": str, "answer": str},
    ),
    "mgsm/exemplars.json": (
        {"records_at": "MGSM_EXEMPLARS.sw", "keys_as": "number", "fields": {"question": "q", "answer": "a"}},
        listed("MGSM_EXEMPLARS", "sw"),
        {"question": str, "answer": str, "number": str},
    ),
    "natural_instructions/en/*.json": (
        {"format": "natural_instructions", "fields": {"answer": "output.0"}},
        listed("Instances"),
        {"definition": str, "input": str, "output": list, "answer": str, "id": str},
    ),
    "ntrex/newstest2019-*.txt": ({"format": "lines"}, non_empty_lines, {"text": str}),
    "nusax/sentiment/*/*.csv": ({}, csv_records, {"text": str, "label": str}),
    "self_instruct/*.jsonl": ({}, non_empty_lines, {"id": str, "instances": list}),
    "sib200/*/*.tsv": ({"quoting": "csv"}, csv_records, {"index_id": str, "category": str, "text": str}),
    "sib200/*/labels.txt": ({"format": "lines"}, non_empty_lines, {"text": str}),
    "tydiqa/tiny*.jsonl.gz": ({"format": "tydiqa"}, gzip_lines, {"question": str, "context": str, "answers": dict}),
    "tydiqa/small_gold_annotation.jsonl": ({"format": "tydiqa"}, non_empty_lines, {"document": str, "yes_no": list}),
    "tydiqa/sample_prediction.jsonl": ({}, non_empty_lines, {"example_id": int}),
    "xcopa/data/*/*.jsonl": ({}, non_empty_lines, {"premise": str, "choice1": str, "choice2": str, "idx": int}),
    "xquad/*.json": (
        {"format": "squad", "fields": {"answer": "answers.text.0"}},
        squad_questions,
        {"question": str, "context": str, "document": str, "answer": str},
    ),
}
NO_DATASETS = {"promptsource_templates", "tokenizers", "xp3_mixture_lists"}


@pytest.mark.parametrize("pattern", TABLE)
def test_every_file_of_a_folder(shared_data: Path, pattern: str) -> None:
    declaration, count, names = TABLE[pattern]
    paths = sorted(shared_data.glob(pattern))
    assert paths, f"no file matches {pattern}"
    for path in paths:
        declared = {"path": str(path.relative_to(shared_data)), **declaration}
        rows = list(read_rows(source_from_mapping(declared, directory=shared_data, where=pattern)))
        assert len(rows) == count(path) > 0, path
        for row in rows:
            assert all(isinstance(row.get(name), kind) for name, kind in names.items()), (path, row)


def test_the_table_leaves_no_folder_and_no_data_file_out(shared_data: Path) -> None:
    folders = {entry.name for entry in shared_data.iterdir() if entry.is_dir()}
    assert {pattern.split("/")[0] for pattern in TABLE} == folders - NO_DATASETS
    read = {path for pattern in TABLE for path in shared_data.glob(pattern)}
    aside = {"README.md", "MANIFEST.json", "LANGUAGES.tsv", "DOCUMENT_IDS.tsv", "CC-BY-SA4.0.txt"}
    for path in shared_data.rglob("*"):
        if path.is_file() and path.relative_to(shared_data).parts[0] not in NO_DATASETS and path not in read:
            assert path.name in aside or path.name.startswith("LICENSE"), path


def test_parallel_sentences_with_their_documents(shared_data: Path) -> None:
    folder = shared_data / "ntrex"
    aligned = {
        "source": "newstest2019-src.eng.txt",
        "target": "newstest2019-ref.swa.txt",
        "document": "DOCUMENT_IDS.tsv",
    }
    declared = {"aligned": aligned, "constants": {"language": "swh_Latn"}}
    rows = list(read_rows(source_from_mapping(declared, directory=folder, where="ntrex")))
    columns = [(folder / name).read_text(encoding="utf-8-sig").split("\n")[:-1] for name in aligned.values()]
    assert [(row["source"], row["target"], row["document"]) for row in rows] == list(zip(*columns, strict=True))
    assert len(rows) == 1997 and len({row["document"] for row in rows}) == 123


def test_one_source_for_several_files_is_their_rows_in_order(shared_data: Path) -> None:
    names = [f"xcopa/data/{language}/val.{language}.jsonl" for language in ("sw", "th", "zh")]
    whole = list(read_rows(source_from_mapping({"path": names}, directory=shared_data, where="here")))
    assert whole == [row for name in names for row in read_rows(shared_data / name)] and len(whole) == 300
