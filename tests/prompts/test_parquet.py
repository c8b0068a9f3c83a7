"""Parquet and Arrow values: every type by its rule, batches in order, damage and hostile columns refused."""

import datetime
import decimal
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xmtf.errors import ConfigError, RecordError
from megatron_xmtf.prompts import RowReport, Source, read_rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

UTC = datetime.timezone.utc
MOMENT = datetime.datetime(2024, 2, 29, 13, 5)


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None], pa.int8(), [1, None]),
        ([2**64 - 1], pa.uint64(), [2**64 - 1]),
        ([True, None], pa.bool_(), [True, None]),
        ([None], pa.null(), [None]),
        ([1.5, math.nan, None], pa.float64(), [1.5, None, None]),
        ([0.1, math.nan, 3.4028234663852886e38, 1e-45], pa.float32(), [0.1, None, 3.4028235e38, 1e-45]),
        ([np.float16(0.1)], pa.float16(), [0.099975586]),
        (["\u00fc", "", None], pa.string(), ["\u00fc", "", None]),
        (["a"], pa.large_string(), ["a"]),
        (["\u00fc".encode(), None], pa.binary(), ["\u00fc", None]),
        ([b"ab"], pa.binary(2), ["ab"]),
        ([decimal.Decimal("12.50"), None], pa.decimal128(6, 2), ["12.50", None]),
        ([decimal.Decimal("1e-7")], pa.decimal256(50, 7), ["0.0000001"]),
        ([datetime.date(1, 1, 1), None], pa.date32(), ["0001-01-01", None]),
        ([datetime.date(2024, 2, 29)], pa.date64(), ["2024-02-29"]),
        ([datetime.time(13, 5), datetime.time(0, 0, 0, 250)], pa.time64("us"), ["13:05:00", "00:00:00.00025"]),
        ([datetime.time(13, 5, 1)], pa.time32("ms"), ["13:05:01"]),
        ([MOMENT, None], pa.timestamp("ms"), ["2024-02-29T13:05:00", None]),
        ([1, -1], pa.timestamp("ns"), ["1970-01-01T00:00:00.000000001", "1969-12-31T23:59:59.999999999"]),
        ([MOMENT], pa.timestamp("us", tz="Africa/Nairobi"), ["2024-02-29T13:05:00+00:00"]),
        ([["a", None], [], None], pa.list_(pa.string()), [["a", None], [], None]),
        ([["a"], None], pa.large_list(pa.string()), [["a"], None]),
        ([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2), [[1, 2], None, [3, 4]]),
        ([{"x": [1.0]}, None], pa.struct([("x", pa.list_(pa.float64()))]), [{"x": [1.0]}, None]),
        ([[("k", 1)], None], pa.map_(pa.string(), pa.int64()), [{"k": 1}, None]),
        (["a", "b", None, "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b", None, "a"]),
        ([[{"t": MOMENT}]], pa.list_(pa.struct([("t", pa.timestamp("s"))])), [[{"t": "2024-02-29T13:05:00"}]]),
    ],
    ids=str,
)
def test_each_type_by_its_rule(tmp_path: Path, values: list[Any], kind: Any, expected: list[Any]) -> None:
    path = written(tmp_path / "rows.parquet", {"v": pa.array(values, type=kind)})
    found = [row["v"] for row in read_rows(path)]
    assert found == expected
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@st.composite
def nested_columns(draw: st.DrawFn) -> list[Any]:
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
    leaf = st.none() | st.fixed_dictionaries(
        {"t": st.none() | text, "n": st.none() | st.lists(st.integers(-9, 9), max_size=3)}
    )
    return draw(st.lists(st.none() | st.lists(leaf, max_size=4), min_size=1, max_size=60))


@given(values=nested_columns(), group=st.integers(1, 20), start=st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_nested_rows_in_any_row_groups(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], group: int, start: int
) -> None:
    kind = pa.list_(pa.struct([("t", pa.string()), ("n", pa.list_(pa.int64()))]))
    table = pa.table({"id": pa.array(range(len(values))), "v": pa.array(values, type=kind)}).slice(start)
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    pq.write_table(table, path, row_group_size=group)
    expected = [{"id": number, "v": value} for number, value in enumerate(values)][start:]
    assert list(read_rows(path)) == expected


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=300, deadline=None)
def test_float32_in_fewest_digits_as_numpy_writes_it(value: float) -> None:
    from megatron_xmtf.prompts.readers.arrow_values import _shortest

    assert np.float32(_shortest(value)) == np.float32(value)
    assert len(repr(_shortest(value))) <= len(repr(float(str(np.float32(value)))))


def test_columns_bytes_and_several_batches(tmp_path: Path) -> None:
    texts = [f"text {number} " * 40 for number in range(5000)]
    path = written(tmp_path / "rows.parquet", {"id": range(5000), "text": texts, "other": texts}, row_group_size=1700)
    consumed: list[int] = []
    rows = list(read_rows(Source(path, columns=("text", "id"), fields={"n": "id"}), on_bytes=consumed.append))
    assert rows == [{"text": text, "n": number} for number, text in enumerate(texts)]
    assert sum(consumed) == path.stat().st_size and len(consumed) >= 5
    with pytest.raises(ConfigError, match="has no column 'txt'; nearest: text"):
        list(read_rows(Source(path, columns=("txt",))))


def test_bad_values_are_bad_rows(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], dtype=np.int32).tobytes())
    cut = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    columns = {
        "text": pa.chunked_array([cut, pa.array(["NUL \0", "c", "d", "e"])]),
        "image": pa.array([b"x", b"x", b"x", b"x", b"\xff\xd8\xff", b"x", b"x"], type=pa.binary()),
        "number": pa.array([1.0, 2.0, 3.0, 4.0, 5.0, math.inf, 7.0]),
    }
    path = written(tmp_path / "rows.parquet", columns)
    report = RowReport()
    rows = list(read_rows(path, on_bad_row="skip", report=report))
    assert [row["number"] for row in rows] == [1.0, 3.0, 7.0]
    assert report.rejected == {"not UTF-8": 2, "NUL character": 1, "infinite number": 1}
    assert "rows.parquet: row 1: column 'text' holds 1 bytes that are not UTF-8" in report.examples["not UTF-8"]
    with pytest.raises(RecordError, match="row 5: column 'number' holds an infinite number"):
        list(read_rows(Source(path, columns=("number",))))
    far = written(tmp_path / "far.parquet", {"when": pa.array([2**60], type=pa.timestamp("ms"))})
    with pytest.raises(RecordError, match="row 0: column 'when' holds a date outside the years 1 to 9999"):
        list(read_rows(far))
    days = written(tmp_path / "days.parquet", {"when": pa.array([2**31 - 1, -(2**31)], type=pa.date32())})
    report = RowReport()
    with pytest.raises(RecordError, match="not one row can be read"):
        list(read_rows(days, on_bad_row="skip", report=report))
    assert report.rejected == {"date out of range": 2}
    twice = written(tmp_path / "map.parquet", {"m": pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))})
    with pytest.raises(RecordError, match="a map that has a key twice"):
        list(read_rows(twice))


def test_refused_columns_may_be_left_out(tmp_path: Path) -> None:
    columns = {
        "a": [1],
        "d": pa.array([3], type=pa.duration("s")),
        "m": pa.array([[(1, 2)]], pa.map_(pa.int8(), pa.int8())),
    }
    path = written(tmp_path / "rows.parquet", columns)
    with pytest.raises(ConfigError, match=r"column 'd' holds duration\[s\], which is not read; .*one or more of a, m"):
        list(read_rows(path))
    with pytest.raises(ConfigError, match="column 'm' holds map"):
        list(read_rows(Source(path, columns=("m",))))
    assert list(read_rows(Source(path, columns=("a",)))) == [{"a": 1}]
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(ConfigError, match="has the column 'a' twice"):
        list(read_rows(path))


def test_damaged_files(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", {"text": [f"text {number}" for number in range(20_000)]})
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[1000:3000] = bytes(2000)
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b'{"a": 1}\n', bytes(altered)):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="is no parquet file, or is damaged or cut off"):
            list(read_rows(path, on_bad_row="skip", report=RowReport()))


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", {"a": [1]})
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from megatron_xmtf.errors import ConfigError\n"
        "from megatron_xmtf.prompts import Source, read_rows\n"
        "from pathlib import Path\n"
        f"for source in (Source(Path({str(path)!r})), Source(Path({str(tmp_path)!r}), format='huggingface')):\n"
        "    try:\n"
        "        list(read_rows(source))\n"
        "    except ConfigError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "reading parquet needs the package pyarrow; pip install 'megatron_xmtf[datasets]'" in first
    assert "needs the package pyarrow" in second


def test_nothing_heavy_is_imported_for_plain_files() -> None:
    program = (
        "import sys, megatron_xmtf.prompts\n"
        "print([name for name in ('pyarrow', 'datasets', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
