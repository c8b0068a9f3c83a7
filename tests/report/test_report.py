"""Pages and pictures: escaped, offline, well-formed, with the figures they were given."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_xmtf.evaluation.results import EvaluatedModel, TaskResult
from megatron_xmtf.report import Change, Html, Page, change_bars, language_task_heatmap, loss_curves
from megatron_xmtf.report.evaluation import changes_by_language_and_task, evaluation_page
from megatron_xmtf.report.svg import mix, ticks

EVIL = '<script>alert("1")</script>\'&'


def words(svg: str) -> list[str]:
    """All drawn text, without what shows on hovering; fails where the SVG is not well-formed XML."""
    nodes = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [(node.text or "") + "".join(child.tail or "" for child in node) for node in nodes]


def test_everything_out_of_data_is_escaped(tmp_path: Path) -> None:
    changes = {(EVIL, EVIL): Change(0.2, 0.4, 0.25)}
    page = Page(EVIL, subtitle=EVIL).key_figure(EVIL, EVIL, detail=EVIL)
    page.section(
        EVIL,
        EVIL,
        Page.table([EVIL], [[EVIL]], caption=EVIL),
        Page.note(EVIL),
        Page.preformatted(EVIL),
        Page.figure(loss_curves({EVIL: [(0, 1), (1, 2)], "b": [(0, 1)]}, x_label=EVIL, y_label=EVIL), EVIL),
        Page.figure(language_task_heatmap(changes), EVIL),
        Page.figure(change_bars([(EVIL, changes[EVIL, EVIL])], value_label=EVIL)),
    )
    text = page.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and 'alert("1")' not in text
    assert text.count("&lt;script&gt;") >= 15


def test_page_forbids_network_and_survives_half_a_surrogate(tmp_path: Path) -> None:
    text = Page("t").section("s", "\ud83d العربية").write(tmp_path / "a" / "p.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "? العربية" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_tables_align_numbers_and_check_widths() -> None:
    table = Page.table(["name", "value"], [["a", 0.51234], ["b", None], ["c", 12345]])
    assert table.count('class="number"') == 4
    assert ">0.5123<" in table and ">–<" in table and ">12,345<" in table
    assert Page.table(["x"], [[Html("<b>1</b>")]]).count("<b>1</b>") == 1
    with pytest.raises(ValueError, match="2 cells, the header 1"):
        Page.table(["x"], [[1, 2]])


def test_loss_curves_leave_gaps_and_name_last_values() -> None:
    svg = loss_curves({"train": [(0, 3.0), (1, math.nan), (2, 2.0), (3, 1.0)], "validation": [(0, 3.5), (3, 2.25)]})
    assert {"train", "validation", "1", "2.25", "step", "loss"} <= set(words(svg))
    first_path = svg.split('<path d="')[1].split('"')[0]
    assert first_path.count("M") == 2, "the NaN splits the line"
    assert "no finite values" in loss_curves({"train": [(0, math.nan)]})
    assert words(loss_curves({"a": [(5, 1.0)]}))  # one point
    assert any("running mean" in text for text in words(loss_curves({"a": [(i, 1 / (i + 1)) for i in range(100)]})))


def test_heatmap_holds_every_figure() -> None:
    changes = {
        ("de", "months"): Change(0.25, 0.75, 0.25, stderr=0.05),
        ("sw", "months"): Change(0.25, 0.10, 0.25, stderr=0.1),
        ("de", "a_task_with_a_long_name_indeed"): Change(None, 0.5, 0.5),
    }
    svg = language_task_heatmap(changes, language_labels={"sw": "Swahili Kiswahili"}, emphasised=["de"])
    drawn = words(svg)
    assert {"25 → 75", "25 → 10", "Swahili Kiswahili", "● de"} <= set(drawn)
    assert changes["de", "months"].is_significant and not changes["sw", "months"].is_significant
    assert not changes["de", "a_task_with_a_long_name_indeed"].is_significant
    # (25 + 25) / 2 and (75 + 10) / 2, in the row of means; Python rounds 42.5 to even
    assert "25 → 42" in drawn
    assert svg.index("● de") < svg.index("Swahili"), "the language that gained most comes first"


def test_bars_show_what_was_measured() -> None:
    both = words(change_bars([("months", Change(0.3, 0.6, 0.25))]))
    assert "30 → 60 %" in both and "before" in both
    assert "before" not in words(change_bars([("months", Change(None, 0.6, 0.25))]))


def test_round_ticks_and_colours() -> None:
    assert ticks(0.13, 0.92) == [0.2, 0.4, 0.6, 0.8]
    assert ticks(-3, 3) == [-2.0, 0.0, 2.0]
    assert ticks(1, 1) == [1]
    assert mix("#ffffff", "#0072b2", 0) == "#ffffff" and mix("#ffffff", "#0072b2", 2) == "#0072b2"


def result(task: str, language: str, template: str, value: float) -> TaskResult:
    return TaskResult(task, "d", language, template, "en", "accuracy", value, 0.05, 40, 0.25, 0.3)


def test_results_become_changes_and_a_page() -> None:
    before = [result("months", "de", template, value) for template, value in (("a", 0.2), ("b", 0.4))]
    after = [result("months", "de", template, value) for template, value in (("a", 0.5), ("b", 0.7))]
    (change,) = changes_by_language_and_task(after, before).values()
    assert (change.before, change.after) == pytest.approx((0.3, 0.6))
    assert (change.chance, change.stderr) == pytest.approx((0.25, 0.05))
    text = evaluation_page(EvaluatedModel("OUT", 40, "abc"), after).html()
    assert "step 40" in text and "60.0 %" in text and "chance 25.0 %" in text
