"""Every kind of line that is no record: named by file and line, or counted, never written in part."""

from pathlib import Path

import pytest

from megatron_xmtf.errors import RecordError
from tests.data.test_preprocess import GOOD, files_of, many_records, run, write

BAD_LINES: list[tuple[str | bytes, str, str]] = [
    ('{"inputs": "a", "targets": "b"', "invalid_json", "not JSON: Expecting ',' delimiter at column 31"),
    ("inputs, targets", "invalid_json", "not JSON"),
    ('{"inputs": "a", "targets": "b"} {}', "invalid_json", "Extra data"),
    ('{"inputs": "a", "targets": "b", "id": NaN}', "invalid_json", "NaN is not JSON"),
    ("[" * 200_000, "invalid_json", "nested too deeply"),
    ('{"inputs": "a", "targets": "b", "id": ' + "9" * 5000 + "}", "invalid_json", "a number is too long"),
    ('["a", "b"]', "not_an_object", "it is a list, not an object"),
    ("null", "not_an_object", "it is null, not an object"),
    ('"text"', "not_an_object", "it is a string"),
    ("3", "not_an_object", "it is a number"),
    ('{"inputs": "a"}', "missing_field", "there is no field 'targets', its fields are: inputs"),
    ("{}", "missing_field", "its fields are: none"),
    ('{"inputs": 3, "targets": "b"}', "not_a_string", "field 'inputs' is a number, not a string"),
    ('{"inputs": "a", "targets": null}', "not_a_string", "field 'targets' is null"),
    ('{"inputs": "a", "targets": ["b"]}', "not_a_string", "field 'targets' is a list"),
    ('{"inputs": "a", "targets": "b", "language": 7}', "not_a_string", "field 'language' is a number"),
    ('{"inputs": "a", "targets": "b", "inputs": "c"}', "duplicate_key", "a key appears twice"),
    (b'{"inputs": "caf\xe9", "targets": "b"}', "invalid_utf8", "byte 16 is not UTF-8"),
    (b'{"inputs": "\xed\xa0\x80", "targets": "b"}', "invalid_utf8", "is not UTF-8"),
    ('{"inputs": "\\ud800 secret", "targets": "b"}', "lone_surrogate", "half of a surrogate pair"),
    (b"\x1f\x8b\x08\x00binary", "invalid_utf8", "byte 2 is not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_each_bad_line_is_named_and_nothing_is_left(
    tmp_path: Path, tokenizer_directory: Path, line: str | bytes, reason: str, message: str
) -> None:
    source = write(tmp_path / "r.jsonl", GOOD, "", line, GOOD)
    (tmp_path / "out").mkdir()
    with pytest.raises(RecordError) as caught:
        run([source], tokenizer_directory, tmp_path / "out" / "d")
    assert f"{source}:3 is not a record: " in str(caught.value) and message in str(caught.value)
    assert "secret" not in str(caught.value) and len(str(caught.value)) < 500  # never the whole content
    assert files_of(tmp_path / "out") == {}

    counts = run([source], tokenizer_directory, tmp_path / "out" / "d", on_bad_record="skip")["counts"]
    assert counts["malformed_reasons"] == {reason: 1}
    assert (counts["read"], counts["kept"], counts["malformed"], counts["blank_lines"]) == (3, 2, 1, 1)


def test_truncated_last_line_mark_and_valid_escapes(tmp_path: Path, tokenizer_directory: Path) -> None:
    source = tmp_path / "r.jsonl"
    source.write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + b'{"inputs": "\\ud83d\\ude00", "targets": "\\u0000b"}\n'
    )
    assert run([source], tokenizer_directory, tmp_path / "d")["counts"]["kept"] == 2
    source.write_bytes(GOOD.encode() + b"\n" + GOOD.encode()[:-9])
    with pytest.raises(RecordError, match="r.jsonl:2 is not a record"):
        run([source], tokenizer_directory, tmp_path / "e")


def test_a_bad_line_in_a_worker_is_the_first_one(tmp_path: Path, tokenizer_directory: Path) -> None:
    lines = many_records(6000)
    lines[3000] = lines[5900] = "{"
    source = write(tmp_path / "r.jsonl", *lines)
    with pytest.raises(RecordError, match=r"r\.jsonl:3001 is not a record"):
        run([source], tokenizer_directory, tmp_path / "out" / "d", workers=2)
    assert files_of(tmp_path / "out") == {}
