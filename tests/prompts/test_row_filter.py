"""Rows are taken by their values, the rest is counted, and a filter that takes none says what there is."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.errors import ConfigError, RecordError
from megatron_xmtf.prompts import RowReport, Source, read_rows, source_from_mapping
from megatron_xmtf.prompts.source_rows import identified_rows

LANGUAGES = ["Polish", "polish", "Croatian", "Polish", "Serbian"]
ROWS = [{"n": n, "info": {"language": name, "grade": 9 + n % 2}, "ok": n > 2} for n, name in enumerate(LANGUAGES)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def source(path: Path, where: Any, **more: Any) -> Source:
    return source_from_mapping({"path": path.name, "where": where, **more}, directory=path.parent, where="job")


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ({"info.language": "Polish"}, [0, 3]),
        ({"info.language": ["Polish", "Serbian"]}, [0, 3, 4]),
        ({"info.language": ["Polish", "absent"], "info.grade": 10}, [3]),
        ({"info.grade": ["9"], "ok": "false"}, [0, 2]),
        ({}, [0, 1, 2, 3, 4]),
    ],
)
def test_rows_taken_and_left_out(path: Path, where: dict[str, Any], numbers: list[int]) -> None:
    report = RowReport()
    assert [row["n"] for row in read_rows(source(path, where), report=report)] == numbers
    assert (report.rows, report.left_out, report.num_rejected) == (len(numbers), 5 - len(numbers), 0)


def test_the_files_own_names_are_meant(path: Path) -> None:
    renamed = source(path, {"info.language": "Polish"}, fields={"info": "n", "language": "info.language"})
    assert list(read_rows(renamed)) == [
        {"info": 0, "language": "Polish", "ok": False},
        {"info": 3, "language": "Polish", "ok": True},
    ]


def test_ids_are_places_in_the_file_whatever_is_filtered(path: Path) -> None:
    def ids(where: dict[str, Any], limit: int | None = None) -> list[str]:
        return [row_id for row_id, _ in identified_rows([source(path, where)], limit=limit)]

    assert ids({"info.language": "Polish"}) == ["rows.jsonl:0", "rows.jsonl:3"]
    assert ids({"info.language": "Serbian"}) == ["rows.jsonl:4"]
    assert ids({"info.language": ["Polish", "Serbian"]}, limit=2) == ["rows.jsonl:0", "rows.jsonl:3"]


def test_no_row_passes(path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"all 5 rows: info.language is asked to be Polsh, and is Polish \(2\)"
    ) as told:
        list(read_rows(source(path, {"info.language": "Polsh"})))
    assert "Croatian (1)" in str(told.value) and "nearest: Polish" in str(told.value)


def test_no_row_passes_both(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"info.grade is asked to be 10, and is 9 \(3\), 10 \(2\)\."):
        list(read_rows(source(path, {"info.language": "Croatian", "info.grade": 10})))


def test_a_row_without_the_field_is_a_bad_row(path: Path) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"n": 5}\n')
    with pytest.raises(RecordError, match=r"rows.jsonl:6: no field 'info.language'"):
        list(read_rows(source(path, {"info.language": "Polish"})))
    report = RowReport()
    assert len(list(read_rows(source(path, {"info.language": "Polish"}), on_bad_row="skip", report=report))) == 2
    assert report.rejected == {"no field 'info.language'": 1} and report.left_out == 3
    with pytest.raises(RecordError, match=r"no single value at 'info'"):
        list(read_rows(source(path, {"info": "Polish"})))


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("Polish", "is not a mapping of field names to values"),
        ({"language": []}, "nor a list of them"),
        ({"language": False}, "put no, yes, true, false and the like into quotes"),
        ({"choices.*.text": "x"}, "leads to many values"),
    ],
)
def test_filters_that_mean_nothing(path: Path, where: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        source(path, where)


def test_the_languages_of_a_real_file_are_its_parts(shared_data: Path) -> None:
    exams = shared_data / "exams" / "multilingual" / "dev.jsonl.tar.gz"
    everything = [row["info"]["language"] for row in read_rows(exams)]
    for language in ("Polish", "Bulgarian"):
        report = RowReport()
        taken = list(read_rows(source(exams, {"info.language": language}), report=report))
        assert len(taken) == everything.count(language) > 10
        assert report.left_out == len(everything) - len(taken)
