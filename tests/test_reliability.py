"""docs/reliability.md names tests that exist, every fault of the table, every promise and every exit code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from megatron_xmtf.errors import ExitCode
from tests.faults.drill import NAMED_TEST, PAGE, ROOT, read_rows


@cache
def names_in(path: Path) -> set[str]:
    """Return the names of a file's test functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_named_test_exists() -> None:
    named = NAMED_TEST.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 80
    missing = [f"{file}::{test}" for file, test in named if test not in names_in(ROOT / file)]
    assert missing == []


def test_every_fault_promise_and_exit_code_has_its_line() -> None:
    rows = read_rows()
    assert [row.number for row in rows] == [str(number) for number in range(1, 46)]
    assert [row.number for row in rows if not row.tests] == []
    text = PAGE.read_text(encoding="utf-8")
    promises = re.findall(r"^\| (P\d+) \| .*::test_", text, re.MULTILINE)
    assert promises == [f"P{number}" for number in range(1, 13)]
    codes = {int(code): name for code, name in re.findall(r"^\| (\d) \| ([A-Z_]+) \|", text, re.MULTILINE)}
    assert codes == {int(code): code.name for code in ExitCode}
