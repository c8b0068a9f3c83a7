import csv
import gzip
import json
from pathlib import Path

import pytest

from megatron_xmtf.errors import ConfigError, MissingError, RecordError
from megatron_xmtf.prompts import Source, read_rows, source_from_mapping

ROWS = [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'he said "no"'}, {"a": "3", "b": "ünï\nline"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl(tmp_path: Path, compressed: bool) -> None:
    text = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)
    path = tmp_path / ("rows.jsonl" + ".gz" * compressed)
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    consumed: list[int] = []
    assert list(read_rows(path, on_bytes=consumed.append)) == ROWS
    assert sum(consumed) == path.stat().st_size


def test_csv_as_the_csv_module_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["a", "b"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert list(read_rows(path)) == ROWS


def test_tsv_without_header_or_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", '5 "apples" left\t1,200\r\nzwei\t2\n')
    source = Source(path, columns=("question", "answer"), quoting="none")
    assert list(read_rows(source)) == [
        {"question": '5 "apples" left', "answer": "1,200"},
        {"question": "zwei", "answer": "2"},
    ]


def test_tsv_asks_for_the_quoting_only_where_it_matters(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", 'id\ttext\n1\tplain "word"\n2\t"a ""b"""\n')
    rows = read_rows(path)
    assert next(rows) == {"id": "1", "text": 'plain "word"'}
    with pytest.raises(RecordError, match=r"rows.tsv:3: a field begins with a double quote; declare quoting"):
        next(rows)
    assert list(read_rows(Source(path, quoting="csv")))[1]["text"] == 'a "b"'
    assert list(read_rows(Source(path, quoting="none")))[1]["text"] == '"a ""b"""'


def test_json_list_inside_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "task.json", json.dumps({"data": {"examples": ROWS}}))
    assert list(read_rows(Source(path, records_at="data.examples"))) == ROWS
    with pytest.raises(RecordError, match="declare records_at; known: data"):
        list(read_rows(path))
    with pytest.raises(RecordError, match="no key 'exmples'; nearest: examples"):
        list(read_rows(Source(path, records_at="data.exmples")))


def test_field_map_renames_and_swaps(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": 1, "b": 2, "c": 3}\n')
    source = Source(path, fields={"a": "b", "b": "a"})
    assert list(read_rows(source)) == [{"a": 2, "b": 1, "c": 3}]
    with pytest.raises(RecordError, match=r"rows.jsonl:1: no field 'bb' to read 'x' from; nearest: b"):
        list(read_rows(Source(path, fields={"x": "bb"})))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"[1, 2]", "JSON list; a row is an object"),
        (b'"text"', "JSON str"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at column 8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (rb'{"a": ["\ud83d"]}', r"lone surrogate '\\ud83d'"),
        (rb'{"a": "\u0000"}', "NUL"),
        (b'{"a": "\x00"}', "NUL"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1} {"a": 2}', "Extra data"),
        (b"{'a': 1}", "not valid JSON"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": "\\ud83d\\ude00"}\n' + line + b"\n")
    rows = read_rows(path)
    assert next(rows) == {"a": "\U0001f600"}
    with pytest.raises(RecordError, match=reason) as caught:
        next(rows)
    assert f"{path}:2" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b\n1,2\n3\n", ":3 has 1 columns where 2 are expected"),
        ("a,a\n1,2\n", ":1: the header names 'a' twice"),
        ('a,b\n1,"never closed\n2,3\n', ":2: the record that starts here cannot be read"),
        ("a,b\n1,caf\udce9\n", ":2 is not UTF-8"),
    ],
)
def test_malformed_table_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = write(tmp_path / "rows.csv", content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecordError) as caught:
        list(read_rows(path))
    assert reason in str(caught.value)


def test_cut_off_gzip(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"a": number}) for number in range(10_000)).encode()
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress(text)[:-200])
    with pytest.raises(RecordError, match="damaged or cut off"):
        list(read_rows(path))
    with pytest.raises(RecordError, match="damaged or cut off"):
        list(read_rows(write(tmp_path / "plain.jsonl.gz", text)))


def test_impossible_declarations(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", "{}\n")
    with pytest.raises(ConfigError, match=r"suffix of rows.txt is not one of jsonl, json, csv, tsv"):
        read_rows(path)
    with pytest.raises(ConfigError, match="delimiter is an option of csv, tsv, not of jsonl"):
        read_rows(Source(path, format="jsonl", delimiter=";"))
    with pytest.raises(ConfigError, match="not one character"):
        read_rows(Source(path, format="csv", delimiter=";;"))
    with pytest.raises(MissingError):
        read_rows(tmp_path / "absent.jsonl")


def test_source_out_of_a_configuration(tmp_path: Path) -> None:
    values = {"path": "rows.tsv", "columns": ["q", "a"], "quoting": "none", "fields": {"question": "q"}}
    source = source_from_mapping(values, directory=tmp_path, where="tasks.yaml: records")
    assert source == Source(tmp_path / "rows.tsv", columns=("q", "a"), quoting="none", fields={"question": "q"})
    with pytest.raises(ConfigError, match=r"tasks.yaml: records: unknown key 'colums', nearest: columns"):
        source_from_mapping({"path": "x.tsv", "colums": []}, directory=tmp_path, where="tasks.yaml: records")
    with pytest.raises(ConfigError, match="path=None"):
        source_from_mapping({}, directory=tmp_path, where="here")


def test_real_files(shared_data: Path) -> None:
    sib = list(read_rows(Source(shared_data / "sib200/eng_Latn/train.tsv", quoting="csv")))
    assert len(sib) == 701 and set(sib[0]) == {"index_id", "category", "text"}
    assert not any(row["text"].startswith('"') and row["text"].endswith('""') for row in sib)
    mgsm = list(read_rows(Source(shared_data / "mgsm/mgsm_sw.tsv", columns=("question", "answer"), quoting="none")))
    assert len(mgsm) == 250 and mgsm[0]["answer"] == "18"
    assert len(list(read_rows(shared_data / "xcopa/data/sw/test.sw.jsonl"))) == 500
    assert len(list(read_rows(shared_data / "nusax/sentiment/sundanese/train.csv"))) == 500
    bbh = Source(shared_data / "bbh/bbh/navigate.json", records_at="examples")
    assert {"input", "target"} == set(next(read_rows(bbh)))
    assert "document_url" in next(read_rows(shared_data / "tydiqa/tiny_dev.jsonl.gz"))
