"""Exemplars: from training rows alone, never the row itself, and a draw that depends on names alone."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xmtf.prompts import PromptedRecord, RenderReport, Template, parse_templates, render_identified_rows
from megatron_xmtf.prompts.rendering.chunk_renderer import RenderPlan
from megatron_xmtf.prompts.rendering.exemplars import ExemplarDraw, build_exemplar_pool
from megatron_xmtf.prompts.templates.delimiters import DELIMITERS, DelimiterStyle, drawn_delimiter
from megatron_xmtf.prompts.templates.variants import Variant, pose_templates

MARKED = [DelimiterStyle("own", "<", "|", ">")]
Row = tuple[str, dict[str, Any]]


def template(**values: Any) -> Template:
    entry = {"name": "ask", "input": "{{ q }}", "target": "{{ a }}", "rationale": "{{ r }}", **values}
    (parsed,) = parse_templates({"templates": [entry]})
    return parsed


def train_rows(count: int, *, start: int = 0) -> list[Row]:
    return [
        (f"t{n}", {"q": f"train {n}", "a": f"A{n}", "r": f"R{n}", "document": f"d{n // 2}"})
        for n in range(start, start + count)
    ]


def own_rows(count: int) -> list[Row]:
    return [(f"v{n}", {"q": f"own {n}", "a": f"B{n}", "r": f"S{n}", "document": f"d{n}"}) for n in range(count)]


def rendered(
    rows: Sequence[Row],
    pool_rows: Sequence[Row],
    variant: Variant,
    *,
    seed: int = 5,
    size: int = 1000,
    max_characters: int = 6000,
    delimiters: Sequence[DelimiterStyle] = MARKED,
    report: RenderReport | None = None,
    **values: Any,
) -> dict[str, PromptedRecord]:
    posed, _ = pose_templates([template(**values)], [variant], delimiters=delimiters)
    pool = build_exemplar_pool(pool_rows, size=size, max_characters=max_characters, seed=seed)
    plan = RenderPlan(tuple(posed), seed, exemplars=pool)
    return {record.id: record for record in render_identified_rows(rows, plan, report=report)}


def shown(record: PromptedRecord) -> list[str]:
    """The exemplars of a record: texts between < and >, input and target around |."""
    *exemplars, question = record.inputs.split("<")[1:]
    assert question.endswith("|") and all(text.endswith(">") for text in exemplars)
    return [text[:-1] for text in exemplars]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_rows=st.integers(1, 12),
    num_training=st.integers(1, 14),
    shots=st.integers(1, 4),
    seed=st.integers(0, 99),
    thought=st.booleans(),
)
def test_exemplars_are_training_rows_of_other_documents(
    num_rows: int, num_training: int, shots: int, seed: int, thought: bool
) -> None:
    rows, training = own_rows(num_rows), train_rows(num_training)
    report = RenderReport()
    records = rendered(rows, training, Variant(shots, None, thought), seed=seed, report=report)
    known = {f"train {n}|" + (f"R{n}\nA{n}" if thought else f"A{n}"): f"d{n // 2}" for n in range(num_training)}
    for number in range(num_rows):
        available = sum(document != f"d{number}" for document in known.values())
        record = records.get(f"v{number}")
        if record is None:
            assert available == 0
            continue
        exemplars = shown(record)
        assert len(exemplars) == min(shots, available) == len(set(exemplars))
        assert all(known[text] != f"d{number}" for text in exemplars)
        assert record.targets == (f"S{number}\nB{number}" if thought else f"B{number}")
        assert record.inputs.endswith(f"<own {number}|")
    counts = next(iter(report.templates.values()))
    assert counts.rendered + counts.no_exemplar == num_rows
    assert counts.short_of_exemplars == sum(len(shown(record)) < shots for record in records.values())


def test_a_row_never_shows_itself_nor_its_own_words() -> None:
    training = [(f"t{n}", {"q": f"train {n // 2}", "a": f"A{n}", "r": "R"}) for n in range(12)]
    records = rendered(training, training, Variant(shots=5))
    assert len(records) == 12
    for row_id, row in training:
        own = {f"{other['q']}|{other['a']}" for _, other in training if other["q"] == row["q"]}
        assert not own & set(shown(records[row_id])), row_id
    alone = RenderReport()
    assert not rendered(training[:2], training[:2], Variant(shots=1), report=alone)
    assert alone.templates["ask+1shot"].no_exemplar == 2


def test_the_draw_is_the_one_that_the_documentation_states() -> None:
    """Ranking by hashes, computed here with hashlib and plain integers."""

    def number(*parts: str) -> int:
        return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")

    def mixed(value: int) -> int:
        mask = (1 << 64) - 1
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    training = train_rows(40)
    in_pool = sorted(training, key=lambda row: number("5", "pool", row[0]))[:10]
    records = rendered(own_rows(20), training, Variant(shots=3), size=10)
    for row_id, row in own_rows(20):
        allowed = [one for one in in_pool if one[1]["document"] != row["document"]]
        key = number("5", "ask", row_id)
        ranked = sorted(allowed, key=lambda one: mixed(key ^ number("exemplar", one[0])))
        assert shown(records[row_id]) == [f"{one['q']}|{one['a']}" for _, one in ranked[:3]]


def test_what_the_draw_depends_on() -> None:
    rows, training = own_rows(60), train_rows(30, start=100)
    records = rendered(rows, training, Variant(shots=2))
    assert rendered(rows[::-1][:20], training, Variant(shots=2)).items() <= records.items()
    assert rendered(rows, training[::-1], Variant(shots=2)) == records
    joined = rendered(rows, [*training, ("new", {"q": "new", "a": "N", "r": "R"})], Variant(shots=2))
    changed = [key for key in records if joined[key] != records[key]]
    assert changed and len(changed) < 20
    assert all("new|N" in shown(joined[key]) for key in changed)
    reseeded = rendered(rows, training, Variant(shots=2), seed=6)
    assert sum(reseeded[key] == records[key] for key in records) < 5
    thought = rendered(rows, training, Variant(2, None, True))
    for key, record in records.items():
        assert [text.split("|")[0] for text in shown(thought[key])] == [text.split("|")[0] for text in shown(record)]


def test_every_training_row_is_shown_about_as_often() -> None:
    records = rendered(own_rows(400), train_rows(20, start=1000), Variant(shots=2))
    times: dict[str, int] = {}
    for record in records.values():
        for text in shown(record):
            times[text] = times.get(text, 0) + 1
    assert len(times) == 20 and 15 < min(times.values()) <= max(times.values()) < 75  # 40 on average


def test_exemplars_that_do_not_fit_are_passed_over() -> None:
    training = [(f"t{n}", {"q": "long " * 40 if n % 2 else f"short {n}", "a": "A", "r": "R"}) for n in range(10)]
    report = RenderReport()
    records = rendered(own_rows(10), training, Variant(shots=3), max_characters=40, report=report)
    assert all(len(shown(record)) == 3 and "long" not in record.inputs for record in records.values())
    report = RenderReport()
    short = rendered(own_rows(10), training, Variant(shots=3), max_characters=25, report=report)
    assert all(len(shown(record)) == 2 for record in short.values())
    assert report.templates["ask+3shot"].short_of_exemplars == 10
    assert not rendered(own_rows(10), training, Variant(shots=3), max_characters=5)


def test_rows_that_the_template_renders_nothing_of_are_no_exemplars() -> None:
    training = [(f"t{n}", {"q": f"q{n}", "a": "" if n % 2 else "A", "r": "R"}) for n in range(8)]
    records = rendered(own_rows(5), training, Variant(shots=8))
    assert {text for record in records.values() for text in shown(record)} == {"q0|A", "q2|A", "q4|A", "q6|A"}


def test_exemplars_have_the_same_list_style_as_the_question() -> None:
    training = [(f"t{n}", {"q": f"q{n}", "a": "yes", "r": "R"}) for n in range(8)]
    rows = [(f"v{n}", {"q": f"own{n}", "a": "no", "r": "R"}) for n in range(40)]
    records = rendered(rows, training, Variant(2, "letters"), answer_choices=["yes", "no"])
    styles = set()
    for record in records.values():
        *exemplars, question = record.inputs.removeprefix("<").split("<")
        listed = question.removesuffix("|").split("\n", 1)[1]
        for text in exemplars:
            inputs, letter = text.removesuffix(">").split("|")
            assert (
                inputs.split("\n", 1)[1] == listed
                and letter == record.choices[0]
                and record.choices[1] == record.targets
            )
        styles.add(listed)
    assert len(styles) > 4


def test_delimiters_are_drawn_and_suit_the_prompt() -> None:
    def names(inputs: str, language: str | None = "en", styles: Sequence[DelimiterStyle] = DELIMITERS) -> set[str]:
        keys = [("0", str(number), "t") for number in range(200)]
        return {drawn_delimiter(styles, inputs, language=language, key=key).name for key in keys}

    plain = {"blank_lines", "lines", "hashes", "arrow"}
    assert names("Is it so?") == plain | {"question_answer", "question_answer_words", "input_output"}
    assert names("Je, ni kweli?", "sw") == names("Question: is it so?") == plain
    assert names("Is it so?\nAnswer:") == {"blank_lines", "lines", "hashes", "inline"}
    spanish = [DelimiterStyle("es", "Pregunta: ", "\nRespuesta: ", "\n\n")]
    assert names("¿Es así?", "es", spanish) == names("¿Es así? Di:", "es", spanish) == {"es"}
    questions = DELIMITERS[5]
    assert questions.exemplar("2+2?", "4") + questions.question("3+4?") == "Q: 2+2?\nA: 4\n\nQ: 3+4?\nA:"


@pytest.mark.parametrize("count", [1, 3, 9, 30])
def test_the_ranking_is_whole_however_little_is_expected(count: int) -> None:
    pool = build_exemplar_pool(train_rows(count), size=1000, max_characters=1, seed=0)
    draw = ExemplarDraw(pool, seed=0)
    few, many = list(draw.ranked("r", "t", 1)), list(draw.ranked("r", "t", 99))
    assert few == many and sorted(few) == list(range(count))
