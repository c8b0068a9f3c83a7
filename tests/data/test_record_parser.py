"""The quick way of reading a line and the strict one give the same records and refuse the same lines."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.data import records
from megatron_xmtf.data.records import BadRecord, RecordParser

NAMES = st.sampled_from(
    ["inputs", "targets", "id", "dataset", "language", "config", "document", "x", 'a"b', 'k":', "é"]
)
TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(['say "a": b', 'x\\": y', "a : b", '" :', "\t", "\\", '\\"', "\u2028"])
)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.floats(allow_nan=True)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=4,
)
SPACE = st.sampled_from(["", "", " ", "\t", "  ", "\r"])


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Write an object by hand: keys may repeat, spaces stand anywhere, escapes are of either kind."""
    pairs = [("inputs", draw(TEXTS)), ("targets", draw(TEXTS)), *draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))]
    ascii_only = draw(st.booleans())
    members = [
        f"{draw(SPACE)}{json.dumps(name, ensure_ascii=ascii_only)}{draw(SPACE)}:{draw(SPACE)}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{draw(SPACE)}"
        for name, value in draw(st.permutations(pairs))
    ]
    line = ("{" + ",".join(members) + "}").encode("utf-8", "surrogatepass")
    return draw(
        st.sampled_from([line, line, line, line.replace(b"x", b"\\ud800"), line.replace(b"a", b"\xff"), line[1:]])
    )


def outcome(parser: RecordParser, line: bytes) -> object:
    try:
        return parser.parse(line)
    except BadRecord as bad:
        return bad.reason, bad.detail


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(lines())
def test_quick_and_strict_reading_agree(line: bytes) -> None:
    quick = RecordParser(kind="pairs", record_format="records", field_map={})
    strict = RecordParser(kind="pairs", record_format="records", field_map={})
    expected = _outcome_of_strict_reading(strict, line)
    assert outcome(quick, line) == expected
    assert outcome(quick, line) == expected  # columns are remembered the first time


def _outcome_of_strict_reading(parser: RecordParser, line: bytes) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_read_quickly", lambda line: None)
        return outcome(parser, line)


@pytest.mark.parametrize(
    "line",
    [
        b'{"inputs": "a", "targets": "b", "inputs": "c"}',
        b'{"inputs" : "a", "targets": "b", "inputs" : "c"}',
        b'{"inputs": "a", "targets": "b", "inputs"\t:"c"}',
        b'{"inputs": "a", "targets": "b", "x": {"k": 1, "k": 2}}',
        b'{"inputs": "a", "targets": "b", "x": [{"k": 1, "k" : 2}]}',
    ],
)
def test_a_key_given_twice_is_refused(line: bytes) -> None:
    with pytest.raises(BadRecord, match="a key appears twice"):
        RecordParser(kind="pairs", record_format="records", field_map={}).parse(line)


@pytest.mark.parametrize(
    "line", [b'{"inputs": "say \\"a\\": b", "targets": "c : d"}', b'{"inputs": "a", "targets": "b", "x": {"k": [{}]}}']
)
def test_colons_in_texts_and_inner_objects_are_no_keys(line: bytes) -> None:
    parser = RecordParser(kind="pairs", record_format="records", field_map={})
    assert parser.parse(line).inputs == json.loads(line)["inputs"]


def test_most_lines_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_read_object", None)
    parser = RecordParser(kind="pairs", record_format="records", field_map={})
    row = {"inputs": "a: b", "targets": "é\n", "id": "7", "choices": ["x", "y"], "language": "sw"}
    assert parser.parse(json.dumps(row).encode()).targets == "é\n"
