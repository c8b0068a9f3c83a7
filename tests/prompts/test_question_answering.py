"""SQuAD and TyDi QA documents as rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts import RowReport, Source, read_rows
from tests.prompts.conftest import squad_rows

SQUAD: dict[str, Any] = {
    "version": "2.0",
    "data": [
        {
            "title": "Peru",
            "paragraphs": [
                {
                    "context": "Lima is the capital.",
                    "qas": [
                        {"id": "q1", "question": "Capital?", "answers": [{"text": "Lima", "answer_start": 0}]},
                        {"id": 2, "question": "Size?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        },
        {"paragraphs": [{"context": "Untitled.", "qas": [{"id": "q3", "question": "Title?"}]}]},
    ],
}


def rows_of(path: Path, value: Any, report: RowReport | None = None) -> list[dict[str, Any]]:
    path.write_text(json.dumps(value), encoding="utf-8")
    return list(read_rows(Source(path, format="squad"), on_bad_row="skip" if report else "raise", report=report))


def test_squad_rows(tmp_path: Path) -> None:
    first, second, third = rows_of(tmp_path / "squad.json", SQUAD)
    assert first == {
        "id": "q1",
        "title": "Peru",
        "document": "Peru",
        "context": "Lima is the capital.",
        "question": "Capital?",
        "answers": {"text": ["Lima"], "answer_start": [0]},
    }
    assert second["id"] == "2" and second["is_impossible"] is True and second["answers"]["text"] == []
    assert third["title"] is None and third["document"] == "article 1"


def test_damage_inside_a_squad_document_is_counted(tmp_path: Path) -> None:
    value = json.loads(json.dumps(SQUAD))
    questions = value["data"][0]["paragraphs"][0]["qas"]
    questions += [
        {"id": "x", "question": 3},
        {"id": True, "question": "?"},
        {"id": "x", "question": "?", "answers": "no"},
        {"id": "x", "question": "?", "answers": [{"text": "Lima"}]},
        "text",
    ]
    value["data"][0]["paragraphs"] += [{"qas": []}, 7]
    value["data"] += [{"title": "no paragraphs"}, None]
    report = RowReport()
    rows = rows_of(tmp_path / "squad.json", value, report)
    assert [row["id"] for row in rows] == ["q1", "2", "q3"]
    assert report.rejected == {"not of the format": 9}
    assert "data[0].paragraphs[0].qas[2]: `question` is '3'" in report.examples["not of the format"]
    for wrong in ([], {"data": {}}, {"rows": []}):
        with pytest.raises(RecordError, match="is no SQuAD document"):
            rows_of(tmp_path / "squad.json", wrong, RowReport())


def test_xquad_flattens_as_the_templates_were_written_for(shared_data: Path) -> None:
    documents = {}
    for language in ("en", "es", "ar", "zh", "hi"):
        path = shared_data / "xquad" / f"xquad.{language}.json"
        rows = list(read_rows(Source(path, format="squad")))
        documents[language] = [(row["id"], row.pop("document")) for row in rows]
        assert rows == list(squad_rows(path)) and len(rows) == 1190
        for row in rows:
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                assert row["context"][start : start + len(text)] == text
    # The same questions in each language: one article has one name, whatever the language.
    assert all(found == documents["en"] for found in documents.values())
    assert len({document for _, document in documents["en"]}) == 48


ANNOTATIONS = [(-1, -1, -1, "NONE"), (1, 11, 14, "NONE"), (0, 11, 14, "YES"), (0, 7, 10, "NO")]
TYDIQA = {
    "example_id": 12,
    "language": "thai",
    "document_title": "\u0e01",
    "document_url": "https://th.wikipedia.org/wiki/1",
    "document_plaintext": "\u0e01\u0e02 one\n\u0e04 two",
    "question_text": "?",
    "passage_answer_candidates": [
        {"plaintext_start_byte": 0, "plaintext_end_byte": 10},
        {"plaintext_start_byte": 11, "plaintext_end_byte": 18},
    ],
    "annotations": [
        {
            "passage_answer": {"candidate_index": chosen},
            "minimal_answer": {"plaintext_start_byte": start, "plaintext_end_byte": end},
            "yes_no_answer": vote,
        }
        for chosen, start, end, vote in [
            (-1, -1, -1, "NONE"),
            (1, 11, 14, "NONE"),
            (0, 11, 14, "YES"),
            (0, 7, 10, "NO"),
        ]
    ],
}


def tydiqa_rows(path: Path, *rows: Any, report: RowReport | None = None) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_rows(Source(path, format="tydiqa"), on_bad_row="skip" if report else "raise", report=report))


def test_tydiqa_offsets_are_bytes(tmp_path: Path) -> None:
    (row,) = tydiqa_rows(tmp_path / "rows.jsonl", TYDIQA)
    assert row == {
        "id": "12",
        "language": "thai",
        "title": "\u0e01",
        "document": "https://th.wikipedia.org/wiki/1",
        "context": "\u0e01\u0e02 one\n\u0e04 two",
        "question": "?",
        "passage": "\u0e04 two",
        "answers": {"text": ["\u0e04", "one"], "answer_start": [7, 3]},
        "yes_no": ["YES", "NO"],
    }
    (hidden,) = tydiqa_rows(tmp_path / "rows.jsonl", {name: TYDIQA[name] for name in TYDIQA if name != "annotations"})
    assert hidden["passage"] is None and hidden["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("start", "end", "chosen", "reason"),
    [
        (1, 3, 0, "offset inside a character"),
        (0, 4, 0, "offset inside a character"),
        (0, 99, 0, "offset outside the text"),
        (6, 3, 0, "offset outside the text"),
        (0, 3, 2, "offset outside the text"),
    ],
)
def test_tydiqa_offsets_that_cannot_be(tmp_path: Path, start: int, end: int, chosen: int, reason: str) -> None:
    row = json.loads(json.dumps(TYDIQA))
    row["annotations"][0]["minimal_answer"] = {"plaintext_start_byte": start, "plaintext_end_byte": end}
    row["annotations"][0]["passage_answer"]["candidate_index"] = chosen
    report = RowReport()
    assert len(tydiqa_rows(tmp_path / "rows.jsonl", row, TYDIQA, report=report)) == 1
    assert report.rejected == {reason: 1}


def test_real_tydiqa(shared_data: Path) -> None:
    path = shared_data / "tydiqa" / "tiny_dev.jsonl.gz"
    rows = list(read_rows(Source(path, format="tydiqa")))
    stored = [json.loads(line) for line in gzip.open(path)]
    assert len(rows) == len(stored) == 11
    found = 0
    for row, raw in zip(rows, stored, strict=True):
        encoded = raw["document_plaintext"].encode()
        spans = {
            (answer["plaintext_start_byte"], answer["plaintext_end_byte"])
            for answer in (annotation["minimal_answer"] for annotation in raw["annotations"])
            if answer["plaintext_start_byte"] >= 0
        }
        assert {encoded[start:end].decode() for start, end in spans} == set(row["answers"]["text"])
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
        assert row["passage"] is None or row["passage"] in row["context"]
        found += len(spans)
    assert found >= 5
    unlabelled = list(read_rows(Source(shared_data / "tydiqa" / "tiny_dev_no_annotations.jsonl.gz", format="tydiqa")))
    assert [row["question"] for row in unlabelled] == [row["question"] for row in rows]
    assert all(row["answers"]["text"] == [] for row in unlabelled)
