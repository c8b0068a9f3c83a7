"""Field maps, constants, several files, aligned text; bad rows raised or counted."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.errors import ConfigError, MissingError, RecordError
from megatron_xmtf.prompts import BadRowError, RowReport, Source, read_rows, source_from_mapping

EXAM = {
    "id": "7",
    "question": {"stem": "2 + 2?", "choices": [{"text": "3", "label": "A"}, {"text": "4", "label": "B"}]},
    "answers": {"text": ["4", "four"]},
    "a.b": "dotted",
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_fields_out_of_what_is_nested(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(EXAM) + "\n")
    fields = {
        "answer": "answers.text.0",
        "question": "question.stem",
        "choices": "question.choices.*.text",
        "first": "question.choices.0",
        "plain": "a.b",
    }
    (row,) = read_rows(Source(path, fields=fields, constants={"language": "en", "split": "train"}))
    assert row == {
        "id": "7",
        "question": "2 + 2?",
        "answers": {"text": ["4", "four"]},
        "answer": "4",
        "choices": ["3", "4"],
        "first": {"text": "3", "label": "A"},
        "plain": "dotted",
        "language": "en",
        "split": "train",
    }


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("question.stm", r"no field 'question.stm' \(at 'stm'\) to read 'x' from; nearest: stem"),
        ("answers.text.2", r"\(at '2'\) to read 'x' from; a list is there"),
        ("answers.text.-1", r"\(at '-1'\)"),
        ("id.0", r"\(at '0'\) to read 'x' from; a str is there: '7'"),
        ("question.choices.*.txt", r"\(at 'txt'\) to read 'x' from; nearest: text"),
        ("question.*", r"\(at '\*'\)"),
        ("idd", r"no field 'idd' to read 'x' from; nearest: id"),
    ],
)
def test_no_such_path(tmp_path: Path, old: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(EXAM))
    with pytest.raises(BadRowError, match=message) as caught:
        list(read_rows(Source(path, fields={"x": old})))
    assert caught.value.reason == f"no field {old!r}" and "rows.jsonl:1" in str(caught.value)


def test_a_constant_never_hides_a_field(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"language": "English"}\n')
    with pytest.raises(ConfigError, match=r"has a field 'language' of its own \('English'\), and constants gives 'en'"):
        list(read_rows(Source(path, constants={"language": "en"}), on_bad_row="skip", report=RowReport()))
    renamed = Source(path, constants={"language": "en"}, fields={"file_language": "language"})
    assert list(read_rows(renamed)) == [{"language": "en", "file_language": "English"}]
    with pytest.raises(ConfigError, match="'language' is named by both fields and constants"):
        read_rows(Source(path, constants={"language": "en"}, fields={"language": "x"}))


def test_several_files_in_their_order(tmp_path: Path) -> None:
    second = write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"n": 1}\n{"n": 2}\n'))
    first = write(tmp_path / "a.jsonl.zst", zstandard.compress(b'{"n": 3}\n'))
    assert [row["n"] for row in read_rows(Source((second, first)))] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"files of different formats \(csv, jsonl\)"):
        read_rows(Source((first, tmp_path / "c.csv")))
    with pytest.raises(MissingError, match=r"absent\.jsonl does not exist"):
        read_rows(Source((first, tmp_path / "absent.jsonl")))
    with pytest.raises(MissingError, match=r"\*\.jsonl does not exist"):
        read_rows(tmp_path / "*.jsonl")


def test_lines_and_aligned_lines(tmp_path: Path) -> None:
    english = write(tmp_path / "en.txt", "\ufeffone\r\n\ntwo\u2028parts\n")
    swahili = write(tmp_path / "sw.txt.gz", gzip.compress(b"moja\n\nmbili"))
    assert list(read_rows(Source(english, format="lines"))) == [{"text": "one"}, {"text": "two\u2028parts"}]
    consumed: list[int] = []
    source = Source(aligned={"source": english, "target": swahili}, constants={"language": "sw"})
    assert list(read_rows(source, on_bytes=consumed.append)) == [
        {"source": "one", "target": "moja", "language": "sw"},
        {"source": "", "target": "", "language": "sw"},
        {"source": "two\u2028parts", "target": "mbili", "language": "sw"},
    ]
    assert sum(consumed) == english.stat().st_size + swahili.stat().st_size
    longer = write(tmp_path / "long.txt", "1\n2\n3\n4\n")
    for files in ({"a": english, "b": longer}, {"b": longer, "a": english}):
        with pytest.raises(RecordError, match=r"en.txt ends after line 3, and .*long.txt goes on"):
            list(read_rows(Source(aligned=files), on_bad_row="skip", report=RowReport()))


def test_an_aligned_bad_line_takes_its_row_and_no_other(tmp_path: Path) -> None:
    left = write(tmp_path / "left.txt", b"1\n\xff\n3\n4\n")
    right = write(tmp_path / "right.txt", b"a\nb\n\x00\nd\n")
    report = RowReport()
    rows = list(read_rows(Source(aligned={"l": left, "r": right}), on_bad_row="skip", report=report))
    assert rows == [{"l": "1", "r": "a"}, {"l": "4", "r": "d"}]
    assert report.rejected == {"not UTF-8": 1, "NUL character": 1}


BAD_LINES = {
    b'{"a": 1': "not valid JSON",
    b"[1]": "not an object",
    b'{"a": "\xff"}': "not UTF-8",
    b'{"a": "\x00"}': "NUL character",
    rb'{"a": "\u0000"}': "NUL character",
    rb'{"a": "\ud800"}': "lone surrogate",
    b'{"a": NaN}': "not valid JSON",
    b'{"a": 1, "a": 2}': "not valid JSON",
    b'{"a": ' + b"[" * 100_000: "nested too deeply",
    b'{"b": 1}': "no field 'a'",
}


@given(kinds=st.lists(st.sampled_from([None, *BAD_LINES]), max_size=40))
@settings(max_examples=40, deadline=None)
def test_every_row_is_read_or_counted(tmp_path_factory: pytest.TempPathFactory, kinds: list[bytes | None]) -> None:
    lines = [b'{"a": %d}' % number if kind is None else kind for number, kind in enumerate(kinds)]
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", b"\n".join(lines))
    good = [{"x": number} for number, kind in enumerate(kinds) if kind is None]
    bad = [BAD_LINES[kind] for kind in kinds if kind is not None]
    source, report = Source(path, fields={"x": "a"}), RowReport()
    if bad and not good:
        with pytest.raises(RecordError, match="not one row can be read; check the declaration. The first: "):
            list(read_rows(source, on_bad_row="skip", report=report))
    else:
        assert list(read_rows(source, on_bad_row="skip", report=report)) == good
    assert report.rows == len(good)
    assert report.rejected == {reason: bad.count(reason) for reason in bad}
    for reason in report.rejected:
        number = next(n for n, kind in enumerate(kinds, start=1) if kind is not None and BAD_LINES[kind] == reason)
        assert f"rows.jsonl:{number}" in report.examples[reason]
    if bad:
        with pytest.raises(BadRowError) as caught:
            list(read_rows(source))
        assert caught.value.reason == bad[0]
    plain = report.to_json()
    assert plain["rows"] + sum(entry["rows"] for entry in plain["rejected"].values()) == len(kinds)


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    for name, quoting in (("rows.csv", "csv"), ("rows.csv", "none")):
        path = write(tmp_path / name, b"a,b\n1,2\n3\n4,\xff\n5,6\n7,8,9\n")
        report = RowReport()
        rows = list(read_rows(Source(path, quoting=quoting), on_bad_row="skip", report=report))
        assert rows == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
        assert report.rejected == {"wrong number of columns": 2, "not UTF-8": 1}
        assert "rows.csv:3 has 1 columns" in report.examples["wrong number of columns"]
    multiline = write(tmp_path / "rows.csv", b'a,b\n1,"x\n\xff\ny"\n2,z\n')
    report = RowReport()
    assert list(read_rows(multiline, on_bad_row="skip", report=report)) == [{"a": "2", "b": "z"}]
    assert "rows.csv:3 is not UTF-8" in report.examples["not UTF-8"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100_000)[:-20]),
        ("rows.jsonl.zst", zstandard.compress(b'{"a": 1}\n' * 100_000)[:-5]),
        ("rows.csv", b'a,b\n1,"never closed\n2,3\n'),
        ("rows.csv", b'a,b\n1,"closed" too early\n2,3\n'),
        ("rows.csv", b"a,\xff\n1,2\n"),
        ("rows.tsv", b'a\tb\n1\t2\n3\t"4\n'),
        ("rows.json", b'[{"a": 1}, {"a": 2}'),
    ],
)
def test_a_file_that_cannot_be_read_on_always_raises(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(RecordError):
        list(read_rows(write(tmp_path / name, content), on_bad_row="skip", report=RowReport()))


def test_skipping_needs_a_report(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "{}\n")
    with pytest.raises(ConfigError, match="needs a report"):
        read_rows(path, on_bad_row="skip")
    assert list(read_rows(write(tmp_path / "empty.jsonl", ""), on_bad_row="skip", report=RowReport())) == []


def test_one_report_over_several_sources(tmp_path: Path) -> None:
    report = RowReport()
    first = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n')
    second = write(tmp_path / "b.jsonl", "[]\n[]\n")
    assert list(read_rows(first, on_bad_row="skip", report=report)) == [{"a": 1}]
    with pytest.raises(RecordError, match=r"b.jsonl: not one row can be read; .*: .*b.jsonl:1 is a JSON list"):
        list(read_rows(second, on_bad_row="skip", report=report))
    assert report.rows == 1 and report.rejected == {"not valid JSON": 1, "not an object": 2}


def test_rows_keyed_by_name(tmp_path: Path) -> None:
    value = {"sw": {"1": {"q": "a"}, "2": {"q": "b"}}}
    path = write(tmp_path / "rows.json", json.dumps(value))
    source = Source(path, records_at="sw", keys_as="number")
    assert list(read_rows(source)) == [{"number": "1", "q": "a"}, {"number": "2", "q": "b"}]
    with pytest.raises(RecordError, match="keys_as='q': the row '1' has a field of that name already"):
        list(read_rows(Source(path, records_at="sw", keys_as="q")))
    with pytest.raises(RecordError, match="keys_as='n' needs an object of rows; there is a list"):
        list(read_rows(Source(write(tmp_path / "list.json", "[{}]"), keys_as="n")))


def test_declarations_out_of_a_configuration(tmp_path: Path) -> None:
    values = {
        "path": ["a.jsonl.gz", "b.jsonl"],
        "fields": {"answer": "answers.text.0"},
        "constants": {"language": "sw", "labels": ["a", "b"], "level": 3},
        "quoting": None,
    }
    source = source_from_mapping(values, directory=tmp_path, where="job.yaml: sources[0]")
    assert source == Source(
        (tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"),
        fields={"answer": "answers.text.0"},
        constants={"language": "sw", "labels": ["a", "b"], "level": 3},
    )
    aligned = source_from_mapping({"aligned": {"source": "a.txt"}}, directory=tmp_path, where="here")
    assert aligned.paths == (tmp_path / "a.txt",) and aligned.resolved_format() == "lines"
    hub = source_from_mapping({"hub": "a/b", "name": "sw", "split": "train"}, directory=tmp_path, where="here")
    assert hub.resolved_format() == "huggingface" and hub.paths == () and hub.label == "a/b"
    saved = source_from_mapping({"path": "saved", "format": "huggingface"}, directory=tmp_path, where="here")
    assert saved.path == tmp_path / "saved"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": []}, "path=\\[\\] is not a file name, nor a list of them"),
        ({"path": ["a.jsonl", 3]}, "path=.* is not a file name"),
        ({"path": "a.jsonl", "hub": "a/b"}, "this one has path and hub"),
        ({"path": "a.jsonl", "aligned": {"x": "y"}}, "this one has path and aligned"),
        ({"aligned": {}}, "this one has nothing"),
        ({"path": "a.jsonl", "constants": ["x"]}, "constants=.* is not a mapping"),
        ({"path": "a.jsonl", "constants": {3: "x"}}, "constants=.* is not a mapping"),
        ({"path": "a.jsonl", "fields": {"x": 3}}, "fields=.* is not a mapping of new names"),
        ({"path": "a.jsonl", "aligned": "x"}, "aligned=.* is not a mapping of field names to files"),
        ({"path": "a.jsonl", "columns": "x"}, "columns='x' is not a list of names"),
        ({"path": "a.jsonl", "columns": ["x"]}, "columns is an option of csv, tsv, parquet, huggingface, not of jsonl"),
        ({"path": "a.jsonl", "split": "train"}, "split is an option of huggingface, not of jsonl"),
        ({"path": "a.jsonl", "format": "xlsx"}, "format 'xlsx' is not one of jsonl, .*huggingface"),
        ({"path": "a.jsonl", "member": ""}, "member='' is not a text"),
        ({"path": "a.jsonl", "keys_as": "n"}, "keys_as is an option of json, not of jsonl"),
        ({"path": "a.gz"}, "suffix of a.gz is not one of"),
        ({"path": "d", "format": "huggingface", "revision": "main"}, "revision='main' is for datasets on the hub"),
        ({"path": ["d", "e"], "format": "huggingface"}, "one directory"),
    ],
)
def test_impossible_declarations(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source_from_mapping(values, directory=tmp_path, where="here")
