"""docs/sources.md is true: its declarations are accepted, its rows are what comes out, its tables are complete."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megatron_xmtf.prompts import Source, read_rows, source_from_mapping
from megatron_xmtf.prompts.sources import SourceFormat

PAGE = (Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
DECLARATIONS = re.findall(r"^```yaml\n(.*?)^```\n(?:```json\n(.*?)^```)?", PAGE, re.MULTILINE | re.DOTALL)


def agrees(shown: Any, found: Any) -> bool:
    if isinstance(shown, str) and shown.endswith("\u2026"):
        return isinstance(found, str) and found.startswith(shown[:-1])
    return shown == found


@pytest.mark.parametrize(("declaration", "shown"), DECLARATIONS)
def test_each_declaration_gives_the_row_shown(shared_data: Path, declaration: str, shown: str) -> None:
    source = source_from_mapping(yaml.safe_load(declaration), directory=shared_data, where="docs/sources.md")
    if not shown:
        assert source.resolved_format() in ("parquet", "huggingface")
        return
    rows = read_rows(source)
    first = next(rows)
    rows.close()
    for name, value in json.loads(shown).items():
        assert agrees(value, first.get(name)), (name, value, first.get(name))


def test_every_key_and_format_is_told() -> None:
    keys = {name for row in re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert keys == {one.name for one in fields(Source)}
    declared = [
        source_from_mapping(yaml.safe_load(declaration), directory=Path("."), where="docs/sources.md").resolved_format()
        for declaration, _ in DECLARATIONS
    ]
    assert set(declared) | {"csv"} == set(get_args(SourceFormat))
