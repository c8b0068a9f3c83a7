"""Turn Arrow columns into JSON values, by a stated rule for each type.

    Arrow type                              value
    null, bool, integers                    as they are
    float64                                 as it is; NaN, which pandas writes where a value is missing, is null
    float16, float32                        the shortest decimal that means the same: 0.1, not 0.10000000149011612
    string                                  text
    binary                                  text, where the bytes are UTF-8 (Spark and others leave the type out)
    decimal                                 text with all its digits: "12.50"
    date, time, timestamp                   ISO 8601: "2024-02-29", "13:05:00", "2024-02-29T13:05:00.25",
                                            with +00:00 where the column has a time zone
    list, struct                            list, object
    map                                     object, where the keys are texts
    dictionary, extension                   what it stands for

A bad row: an infinite number, bytes that are not UTF-8, a NUL character, a date outside the years 1 to 9999, a map
that has a key twice. Refused with the column's name: durations, unions and all else.
"""

from __future__ import annotations

import datetime
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, Reject, Row

__all__ = ["batch_rows", "check_schema"]

EPOCH = datetime.datetime(1970, 1, 1)
SMALLEST_NORMAL = 2.0**-126
"""Of float32."""
UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class _BadValue:
    """Stands where a value cannot be read, until its row is made."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message


def check_schema(schema: pa.Schema, columns: Sequence[str] | None, label: str) -> list[str]:
    """Return the names of the columns to read.

    Raises:  ConfigError: no such column, two columns of one name, a type that has no rule.
    """
    names = list(schema.names)
    for name in columns if columns is not None else ():
        if name not in names:
            raise ConfigError(f"{label} has no column {name!r}; {nearest_names(name, names)}.")
    chosen = list(columns) if columns is not None else names
    for name in chosen:
        if names.count(name) > 1:
            raise ConfigError(f"{label} has the column {name!r} twice; which one is meant cannot be said.")
        refused = _unread_type(schema.field(name).type)
        if refused is not None:
            raise ConfigError(
                f"{label}: column {name!r} holds {refused}, which is not read; declare columns without it: one or more "
                f"of {', '.join(other for other in names if other != name)}."
            )
    return chosen


def _unread_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the first type in a column's type that has no rule."""
    if isinstance(kind, pa.BaseExtensionType):
        return _unread_type(kind.storage_type)
    if kinds.is_struct(kind):
        return next((found for field in kind if (found := _unread_type(field.type)) is not None), None)
    if kinds.is_map(kind):
        return _unread_type(kind.item_type) if _is_text(kind.key_type) else kind
    if kinds.is_dictionary(kind) or _is_list(kind):
        return _unread_type(kind.value_type)
    return None if _converter(kind) is not None else kind


def batch_rows(batch: pa.RecordBatch, label: str, first: int, reject: Reject) -> LocatedRows:
    """Yield the rows of a batch, whose first row is the file's row `first` (counted from 0)."""
    columns = [(name, _values(column)) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    for number in range(batch.num_rows):
        where = f"{label}: row {first + number}"
        row: Row = {name: values[number] for name, values in columns}
        bad = next(((name, found) for name, value in row.items() if (found := _bad_value(value)) is not None), None)
        if bad is not None:
            reject(BadRowError(bad[1].reason, f"{where}: column {bad[0]!r} {bad[1].message}."))
            continue
        yield where, row


def _bad_value(value: Any) -> _BadValue | None:
    if isinstance(value, _BadValue):
        return value
    if isinstance(value, (list, dict)):
        elements = value if isinstance(value, list) else value.values()
        return next((found for element in elements if (found := _bad_value(element)) is not None), None)
    return None


def _values(array: pa.Array) -> list[Any]:
    """Convert a whole column, inside out."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage)
    if kinds.is_dictionary(kind):
        meanings = _values(array.dictionary)
        return [None if index is None else meanings[index] for index in array.indices.to_pylist()]
    if kinds.is_struct(kind):
        members = [(field.name, _values(array.field(position))) for position, field in enumerate(kind)]
        present = array.is_valid().to_pylist()
        return [{name: values[n] for name, values in members} if there else None for n, there in enumerate(present)]
    if kinds.is_map(kind):
        return [None if pairs is None else _object(pairs) for pairs in _lists(array, _pairs(array))]
    if kinds.is_fixed_size_list(kind):
        array = array.cast(pa.list_(kind.value_type))
    if _is_list(kind):
        return _lists(array, _values(array.values))
    convert = _converter(kind)
    assert convert is not None, f"check_schema let {kind} through"
    return convert(array)


def _lists(array: pa.Array, values: list[Any]) -> list[Any]:
    """Cut the values of a list or map array at its offsets, which may begin anywhere in them."""
    offsets = array.offsets.to_pylist()
    present = array.is_valid().to_pylist()
    return [values[offsets[n] : offsets[n + 1]] if there else None for n, there in enumerate(present)]


def _pairs(array: pa.Array) -> list[Any]:
    return list(zip(_values(array.keys), _values(array.items), strict=True))


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    for key, _ in pairs:
        if isinstance(key, _BadValue):
            return key
    made = dict(pairs)
    return made if len(made) == len(pairs) else _BadValue("key given twice", "holds a map that has a key twice")


def _is_list(kind: pa.DataType) -> bool:
    return kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return kinds.is_string(kind) or kinds.is_large_string(kind)


def _converter(kind: pa.DataType) -> Callable[[pa.Array], list[Any]] | None:
    """Return what converts an array of a type that has no type inside it; None: no rule."""
    if kinds.is_null(kind) or kinds.is_boolean(kind) or kinds.is_integer(kind):
        return _plain
    if kinds.is_float64(kind):
        return _floats
    if kinds.is_float32(kind):
        return _short_floats
    if kinds.is_float16(kind):
        return lambda array: _short_floats(array.cast(pa.float32()))
    if _is_text(kind):
        return _texts
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind):
        return _decoded
    if kinds.is_decimal(kind):
        return lambda array: [None if value is None else format(value, "f") for value in array.to_pylist()]
    if kinds.is_date32(kind):
        return lambda array: _dates(array.cast(pa.int32()), 1)
    if kinds.is_date64(kind):
        return lambda array: _dates(array.cast(pa.int64()), 86_400_000)
    if kinds.is_timestamp(kind):
        return lambda array: _instants(array.cast(pa.int64()), kind.unit, "" if kind.tz is None else "+00:00", False)
    if kinds.is_time(kind):
        width = pa.int32() if kinds.is_time32(kind) else pa.int64()
        return lambda array: _instants(array.cast(width), kind.unit, "", True)
    return None


def _plain(array: pa.Array) -> list[Any]:
    return array.to_pylist()


def _floats(array: pa.Array) -> list[Any]:
    return [value if value is None or math.isfinite(value) else _not_finite(value) for value in array.to_pylist()]


def _not_finite(value: float) -> Any:
    return None if math.isnan(value) else _BadValue("infinite number", "holds an infinite number, which is not JSON")


def _short_floats(array: pa.Array) -> list[Any]:
    return [
        value if value is None else _shortest(value) if math.isfinite(value) else _not_finite(value)
        for value in array.to_pylist()
    ]


def _shortest(value: float) -> float:
    """Return the decimal of fewest digits that rounds to the same float32; nine digits always do."""
    packed = struct.pack("f", value)
    # Every decimal of six digits has a float32 of its own, but for the subnormal numbers, whose digits run out.
    for digits in range(6 if abs(value) >= SMALLEST_NORMAL else 1, 9):
        text = f"{value:.{digits}g}"
        try:
            if struct.pack("f", float(text)) == packed:
                return float(text)
        except OverflowError:  # rounded up beyond the largest float32
            continue
    return float(f"{value:.9g}")


def _texts(array: pa.Array) -> list[Any]:
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        return _decoded(array.cast(pa.large_binary() if kinds.is_large_string(array.type) else pa.binary()))
    return [_without_nul(value) if value is not None and "\0" in value else value for value in values]


def _without_nul(value: str) -> Any:
    return _BadValue("NUL character", "holds a NUL character; text may not")


def _decoded(array: pa.Array) -> list[Any]:
    return [None if value is None else _decode(value) for value in array.to_pylist()]


def _decode(value: bytes) -> Any:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return _BadValue("not UTF-8", f"holds {len(value):,} bytes that are not UTF-8; declare columns without it")
    return _without_nul(text) if "\0" in text else text


def _dates(days: pa.Array, per_day: int) -> list[Any]:
    return [None if value is None else _moment(days=value // per_day) for value in days.to_pylist()]


def _instants(counts: pa.Array, unit: str, zone: str, time_only: bool) -> list[Any]:
    per_second = UNITS_PER_SECOND[unit]
    digits = len(str(per_second)) - 1
    made: list[Any] = []
    for value in counts.to_pylist():
        if value is None:
            made.append(None)
            continue
        seconds, fraction = divmod(value, per_second)
        moment = _moment(seconds=seconds)
        if isinstance(moment, str):
            moment = moment.partition("T")[2] if time_only else moment
            moment += (f".{fraction:0{digits}}".rstrip("0") if fraction else "") + zone
        made.append(moment)
    return made


def _moment(*, days: int | None = None, seconds: int = 0) -> Any:
    """Word the date so many days after 1 January 1970, or the moment so many seconds after its start."""
    try:
        if days is not None:
            return (EPOCH + datetime.timedelta(days)).date().isoformat()
        return (EPOCH + datetime.timedelta(seconds=seconds)).isoformat()
    except OverflowError:
        return _BadValue("date out of range", "holds a date outside the years 1 to 9999")
