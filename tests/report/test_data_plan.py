"""A data plan as a page and as a table: the plan's own figures, offline, whatever the names are."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_xmtf.planning.data_plan import DataPlan, build_data_plan
from megatron_xmtf.report.data_plan import data_plan_page
from megatron_xmtf.report.plan_pictures import Cell, cell_heatmap, component_bars, length_bars, stacked_bars
from megatron_xmtf.report.plan_table import display_width, fold_rows, word_data_plan
from tests.planning.tiny_mixture import run_config, write_mixture


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> DataPlan:
    directory = tmp_path_factory.mktemp("plan")
    return build_data_plan(run_config(directory, write_mixture(directory)), by=["template"])


def drawn(svg: str) -> list[str]:
    """All drawn text, without what shows on hovering; fails where the SVG is not well-formed XML."""
    nodes = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [(node.text or "") + "".join(child.tail or "" for child in node) for node in nodes]


def test_page_holds_the_figures_and_loads_nothing(plan: DataPlan, tmp_path: Path) -> None:
    text = data_plan_page(plan, title="train.yaml").write(tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<(script|link|img|iframe)|\bsrc=|url\(", text)
    for section in ("Languages", "Datasets × languages", "Mixture", "Lengths", "All figures"):
        assert f"<h2>{section}</h2>" in text
    for row in plan["cells"]:
        cells = [f"<td>{row['dataset']}</td>", f"<td>{row['language']}</td>"]
        cells += [f'<td class="number">{row[name]:,}</td>' for name in ("records", "examples", "tokens")]
        assert "".join(cells) in text
    assert f"{plan['run']['examples']:,}" in text
    for warning in plan["warnings"]:
        assert warning["message"].split(":")[0] in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_names_out_of_data_cannot_become_markup(plan: DataPlan, tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    rename = {"squad": evil, "yo": evil}
    hostile: Any = dict(plan)
    for table in ("datasets", "languages", "cells", "entries"):
        hostile[table] = [
            {key: rename.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
            for row in hostile[table]
        ]
    hostile["components"] = [{**part, "name": evil} for part in plan["components"]]
    text = data_plan_page(hostile, title=evil).html()
    assert "<script" not in text and 'alert("1")' not in text and text.count("&lt;script&gt;") > 8
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_table_has_the_same_figures_as_the_plan(plan: DataPlan) -> None:
    text = word_data_plan(plan, fold=False)
    lines = [line.split() for line in text.splitlines()]
    for table, names in (
        ("entries", ["entry"]),
        ("datasets", ["dataset"]),
        ("languages", ["language"]),
        ("cells", ["dataset", "language"]),
    ):
        for row in plan[table]:  # type: ignore[literal-required]
            figures = [f"{row[name]:,}" for name in ("records", "examples", "tokens", "target_tokens")]
            loss = [f"{100 * row['loss_fraction']:.2f}", "%", f"{row['epochs']:,.2f}", f"{row['most_draws']:,}"]
            expected = [*(row[name] for name in names), *figures, *loss, f"{row['dropped']:,}"]
            assert expected in lines, expected
    assert all(f"! {warning['message']}" in text for warning in plan["warnings"])
    assert "cut" not in text.split("most: ")[0], "nothing is truncated: no column for it"
    for row in plan["by"]["template"]:
        assert any(line[:2] == [row["template"], f"{row['records']:,}"] for line in lines)


def test_columns_are_aligned_whatever_the_script(plan: DataPlan) -> None:
    wide: Any = {
        **plan,
        "languages": [
            {**row, "language": name} for row, name in zip(plan["languages"], "ไทย 日本語 sw é́".split(), strict=True)
        ],
    }
    text = word_data_plan(wide)
    (block,) = [part for part in text.split("\n\n") if part.startswith("languages (4)")]
    assert len({display_width(line) for line in block.splitlines()[1:]}) == 1


def test_small_lines_are_folded_into_one_that_sums_them(plan: DataPlan) -> None:
    rows = [{**plan["cells"][0], "language": f"l{number}", "most_draws": number} for number in range(100)]
    folded = fold_rows(rows, ["dataset", "language"], 10)
    assert len(folded) == 11 and folded[:10] == rows[:10]
    assert folded[10]["dataset"] == "... 90 more"
    assert folded[10]["examples"] == sum(row["examples"] for row in rows[10:])
    assert folded[10]["most_draws"] == 99
    assert folded[10]["epochs"] == pytest.approx(rows[0]["epochs"])
    assert fold_rows(rows[:11], ["dataset", "language"], 10) == rows[:11], "one line is not folded"
    long: Any = {**plan, "cells": rows}
    assert "... 84 more" in word_data_plan(long)
    assert "more" not in word_data_plan(long, fold=False)


def test_bars_add_up_and_name_the_rest() -> None:
    parts = {f"d{number}": 0.01 * number for number in range(1, 10)}
    svg = stacked_bars([("sw", parts), ("yo", {"d9": 0.55})], notes={"sw": "3 epochs"})
    assert {"sw", "yo", "45 %", "55 %", "other", "3 epochs", "d9", "d4"} <= set(drawn(svg))
    assert "d1" not in drawn(svg), "the smallest are drawn as other"
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="16"', svg)]
    assert widths[-1] == pytest.approx(sum(widths[:-1]) * 55 / 45, rel=0.01)


def test_heatmap_draws_what_there_is() -> None:
    cells = {("sw", "squad"): Cell("2.5", 0.5, "sw, squad"), ("yo", "tydi"): Cell("9", -0.9, "yo, tydi")}
    svg = cell_heatmap(["sw", "yo"], ["squad", "tydi"], lambda row, column: cells.get((row, column)), label="map")
    assert sorted(drawn(svg)) == sorted(["sw", "yo", "squad", "tydi", "2.5", "9"])
    assert svg.count('fill="none"') == 2, "two pairs without data"


def test_lengths_and_components(plan: DataPlan) -> None:
    words = drawn(length_bars(plan["lengths"]))
    assert "longer than a row" in words and "34+" in words
    words = drawn(component_bars([{**plan["components"][0], "limited_by": "max_epochs"}]))
    assert any(word.endswith("epochs, max_epochs") for word in words)
