"""Leave out the rows of a file that hold other values than those asked for, and count them.

    where  info.language: [Polish, Croatian]

    row    {"id": "7", "info": {"language": "Polish"}}       passes
           {"id": "8", "info": {"language": "polish"}}       left out: texts are compared letter by letter
           {"id": "9", "info": {}}                           a bad row: there is nothing to compare

Fields have the names that the file gives them, before any field map. A number is compared by its wording in JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, Row
from megatron_xmtf.prompts.readers.field_map import value_at

__all__ = ["RowFilter"]

MAX_VALUES_REMEMBERED = 1000
MAX_VALUES_NAMED = 12


class RowFilter:
    """The filter of one source, with its counts."""

    def __init__(self, wanted: Mapping[str, tuple[str, ...]]) -> None:
        self.wanted = wanted
        self.passed = 0
        self.left_out = 0
        self._found: dict[str, Counter[str]] = {path: Counter() for path in wanted}
        """Values of the rows before the first that passes."""

    def passes(self, row: Row, where: str) -> bool:
        """Tell whether a row holds one of the wanted values at each path.

        Raises:  BadRowError: the row has no such field, or one that is no single value.
        """
        passes = True
        for path, wanted in self.wanted.items():
            value = value_at(row, path, "where", where)
            if isinstance(value, list | dict):
                reason = f"no single value at {path!r}"
                raise BadRowError(reason, f"{where}: {reason} to compare with {', '.join(wanted)}: {str(value)[:40]!r}")
            text = value if isinstance(value, str) else json.dumps(value)
            found = self._found[path]
            if not self.passed and (text in found or len(found) < MAX_VALUES_REMEMBERED):
                found[text] += 1
            passes = passes and text in wanted
        self.passed += passes
        self.left_out += not passes
        return passes

    def require_some(self, label: str) -> None:
        """Check, after the last row, that not all were left out.

        Raises:  ConfigError: they were; it names the values that occur.
        """
        if self.passed or not self.left_out:
            return
        lines = []
        for path, wanted in self.wanted.items():
            found = self._found[path]
            named = ", ".join(f"{value} ({count:,})" for value, count in found.most_common(MAX_VALUES_NAMED))
            more = f" and {len(found) - MAX_VALUES_NAMED:,} more" if len(found) > MAX_VALUES_NAMED else ""
            absent = [value for value in wanted if value not in found]
            hint = f"; {nearest_names(absent[0], found)}" if absent else ""
            lines.append(f"{path} is asked to be {' or '.join(wanted)}, and is {named}{more}{hint}")
        raise ConfigError(f"{label}: where leaves out all {self.left_out:,} rows: {'. '.join(lines)}.")
