"""How templates are posed: options, letters, chains of thought; what a variant does not apply to."""

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_xmtf.errors import ConfigError, TemplateError
from megatron_xmtf.prompts import PromptedRecord, RenderReport, Template, parse_templates, render_identified_rows
from megatron_xmtf.prompts.rendering.chunk_renderer import RenderPlan
from megatron_xmtf.prompts.templates.options import OPTION_STYLES, OptionStyle
from megatron_xmtf.prompts.templates.variants import PLAIN, Variant, parse_variant, pose_templates

ROW = {"q": "Is ice cold?", "label": 1, "why": "Ice is frozen water."}


def own(**values: Any) -> Template:
    entry = {
        "name": "ask",
        "input": "{{ q }}",
        "target": "{{ answer_choices[label] }}",
        "answer_choices": ["no", "yes"],
        **values,
    }
    (template,) = parse_templates({"templates": [entry]}, source="T.yaml")
    return template


def rendered(
    template: Template,
    names: Sequence[str],
    rows: Sequence[dict[str, Any]] = (ROW,),
    *,
    report: RenderReport | None = None,
    **options: Any,
) -> list[PromptedRecord]:
    posed, not_made = pose_templates([template], [parse_variant(name) for name in names], **options)
    assert not not_made, not_made
    numbered = ((str(row.get("id", number)), row) for number, row in enumerate(rows))
    return list(render_identified_rows(numbered, RenderPlan(tuple(posed), seed=3), report=report))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("plain", PLAIN),
        ("3shot", Variant(shots=3)),
        ("options", Variant(options="options")),
        ("letters+cot", Variant(options="letters", chain_of_thought=True)),
        ("12shot+options+cot", Variant(12, "options", True)),
    ],
)
def test_variant_names(name: str, variant: Variant) -> None:
    assert parse_variant(name) == variant and variant.name == name


@pytest.mark.parametrize("name", ["", "0shot", "100shot", "cot+3shot", "3shotcot", "options+letters", "+cot", "3shot+"])
def test_bad_variant_names(name: str) -> None:
    with pytest.raises(ConfigError, match="3shot\\+options\\+cot"):
        parse_variant(name)


def test_options_follow_the_prompt_and_list_every_choice() -> None:
    style = OptionStyle("own", "OPTIONS:", "-")
    plain, options = rendered(own(), ["plain", "options"], option_styles=[style])
    assert (plain.inputs, plain.template) == ("Is ice cold?", "ask")
    assert (options.inputs, options.template) == ("Is ice cold?\nOPTIONS:\n- no\n- yes", "ask+options")
    assert options.targets == plain.targets == "yes" and options.choices == plain.choices == ["no", "yes"]


def test_options_stand_before_a_closing_cue_or_where_the_template_says() -> None:
    style = [OptionStyle("own", "", "(A)")]
    (before,) = rendered(own(input="{{ q }}\nAnswer:"), ["options"], option_styles=style)
    assert before.inputs == "Is ice cold?\n(A) no\n(B) yes\nAnswer:"
    placed = own(input="Choose.{{ ' ' + options_block if options_block }} {{ q }}")
    assert placed.places_options
    plain, options = rendered(placed, ["plain", "options"], option_styles=style)
    assert plain.inputs == "Choose. Is ice cold?" and options.inputs == "Choose. (A) no\n(B) yes Is ice cold?"


@pytest.mark.parametrize(
    ("marker", "letters"), [("(A)", ["(A)", "(B)"]), ("A.", ["A", "B"]), ("A)", ["A", "B"]), ("1.", ["1", "2"])]
)
def test_letters_are_target_and_choices(marker: str, letters: list[str]) -> None:
    (record,) = rendered(own(), ["letters"], option_styles=[OptionStyle("own", "", marker)])
    assert record.targets == letters[1] and record.choices == letters and record.choice_index == 1
    assert record.inputs.splitlines()[1:] == [f"{marker} no", f"{marker.translate({65: 'B', 49: '2'})} yes"]


def test_many_letters() -> None:
    assert OptionStyle("own", "", "A.").letters(28)[24:] == ["Y", "Z", "AA", "AB"]
    assert not OptionStyle("own", "", "-").lettered and not OptionStyle("own", "", "*").lettered


def test_styles_are_drawn_by_row_and_suit_the_language() -> None:
    rows = [{**ROW, "id": str(number)} for number in range(300)]

    def headings(language: str | None) -> set[str]:
        return {record.inputs.split("\n")[1] for record in rendered(own(language=language), ["options"], rows)}

    assert len(headings("en")) == len({style.block(["no", "yes"]).split("\n")[0] for style in OPTION_STYLES})
    assert headings("sw") == {"- no", "(A) no", "A. no", "A) no", "1. no"}
    forward = {record.id: record.inputs for record in rendered(own(), ["options"], rows)}
    assert forward == {record.id: record.inputs for record in rendered(own(), ["options"], rows[::-1])}
    own_style = [OptionStyle("own", "Pilihan:", "-")]
    (malay,) = rendered(own(language="ms"), ["options"], option_styles=own_style)
    assert malay.inputs.split("\n")[1] == "Pilihan:"


def test_rows_whose_target_is_no_option_are_counted() -> None:
    report = RenderReport()
    template = own(target="{{ label }}")
    assert rendered(template, ["options"], [{**ROW, "label": "yes"}, {**ROW, "label": "maybe"}], report=report)
    counts = report.templates["ask+options"]
    assert (counts.rendered, counts.no_option) == (1, 1)


def test_rationale_comes_before_the_answer() -> None:
    template = own(
        rationale="{{ why }}",
        chain_of_thought={"input": "{{ input }} Think first.", "target": "{{ rationale }} So {{ target }}."},
    )
    plain, thought, letters = rendered(
        template, ["plain", "cot", "letters+cot"], option_styles=[OptionStyle("own", "", "(A)")]
    )
    assert (plain.inputs, plain.targets) == ("Is ice cold?", "yes")
    assert (thought.inputs, thought.targets) == ("Is ice cold? Think first.", "Ice is frozen water. So yes.")
    assert thought.choices is None and thought.template == "ask+cot"
    assert letters.targets == "Ice is frozen water. So (B)." and "(B) yes" in letters.inputs
    (default,) = rendered(own(rationale="{{ why }}"), ["cot"])
    assert (default.inputs, default.targets) == ("Is ice cold?", "Ice is frozen water.\nyes")


def test_rows_without_a_rationale_are_counted() -> None:
    report = RenderReport()
    assert not rendered(own(rationale="{{ why }}"), ["cot"], [{**ROW, "why": " "}], report=report)
    assert report.templates["ask+cot"].no_rationale == 1


def test_separators_of_the_row_survive_in_options_and_rationales() -> None:
    row = {"q": "a ||| b?", "label": 0, "why": "since ||| it is", "c": ["x ||| y", "z"]}
    template = own(answer_choices=["{{ c[0] }}", "{{ c[1] }}"], rationale="{{ why }}")
    options, thought = rendered(template, ["options", "cot"], [row], option_styles=[OptionStyle("own", "", "-")])
    assert options.inputs == "a ||| b?\n- x ||| y\n- z" and options.targets == "x ||| y"
    assert thought.targets == "since ||| it is\nx ||| y"


def test_draws_of_the_template_are_the_same_in_every_variant() -> None:
    template = own(input="{{ q }} {{ range(1000) | list | choice }}", rationale="{{ why }}")
    records = rendered(template, ["plain", "cot"])
    assert records[0].inputs == records[1].inputs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chain_of_thought": {"target": "{{ rationale }}{{ target }}"}}, "needs a rationale"),
        ({"rationale": "{{ why }}", "chain_of_thought": {"target": "{{ target }}, as {{ rationale }}"}}, "explains"),
        ({"rationale": "{{ why }}", "chain_of_thought": {"target": "{{ target }}"}}, "explains nothing"),
        ({"rationale": "{{ why }}", "chain_of_thought": {"target": "{{ rationale }}"}}, "explains nothing"),
        ({"rationale": "{{ why }}", "chain_of_thought": {"input": "Think."}}, "does not insert {{ input }}"),
        ({"rationale": "{{ why }}", "chain_of_thought": {"output": "x"}}, "unknown key 'output'"),
        ({"rationale": "{{ why | shorten }}"}, "rationale, line 1: no filter 'shorten'"),
        ({"rationale": 7}, "rationale=7 is not a string"),
        ({"translation": "google"}, "not one of human, machine"),
    ],
)
def test_bad_chain_of_thought(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        own(**changes)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, False),
        ({"input": "{{ q }} {{ answer_choices | join(' or ') }}?"}, True),
        ({"input": "{{ q }} Yes or no?"}, True),
        ({"input": "{{ q }} I know that nothing is known, eyes"}, False),
        ({"input": "{{ q }} {{ 'Yes' }} or {{ 'no' }}?"}, True),
        ({"input": "{% if label == 'yes no' %}x{% endif %}{{ q }}"}, False),
        ({"input": "{{ q }} yes or no?", "metadata": {"choices_in_prompt": False}}, False),
        ({"metadata": {"choices_in_prompt": True}}, True),
        ({"input": "{{ a }} {{ b }}", "answer_choices": ["{{ a }}", "{{ b }}"]}, True),
        ({"input": "{{ q }} {{ a }}", "answer_choices": ["{{ a }}", "{{ b }}"]}, False),
        ({"input": "{{ q }}", "answer_choices": "{% for x in c %}{{ x }} ||| {% endfor %}"}, False),
        ({"input": "{{ q }} {{ c | join }}", "answer_choices": "{% for x in c %}{{ x }} ||| {% endfor %}"}, True),
    ],
)
def test_whether_a_prompt_shows_its_choices(changes: dict[str, Any], shown: bool) -> None:
    template = own(**changes)
    assert template.lists_choices is shown
    posed, not_made = pose_templates([template], [PLAIN, Variant(options="options"), Variant(options="letters")])
    assert [one.name for one in posed] == (["ask"] if shown else ["ask", "ask+options", "ask+letters"])
    assert set(not_made) == ({"ask+options", "ask+letters"} if shown else set())


def test_what_does_not_apply_is_said() -> None:
    template = own(answer_choices=None, target="{{ label }}")
    posed, not_made = pose_templates([template], [Variant(1, "options", True), Variant(options="letters"), PLAIN])
    assert [one.name for one in posed] == ["ask"]
    assert not_made == {
        "ask+1shot+options+cot": "the template has no rationale",
        "ask+letters": "the template has no answer choices",
    }


def test_letters_need_a_style_with_letters() -> None:
    with pytest.raises(ConfigError, match="no style with letters"):
        pose_templates([own()], [Variant(options="letters")], option_styles=[OptionStyle("own", "", "-")])


@pytest.mark.parametrize("field", ["rationale", "chain_of_thought"])
def test_the_new_jinja_is_behind_the_same_limits(field: str) -> None:
    """A hostile rationale is as powerless as a hostile prompt."""
    for jinja, limit in (("{{ ''.__class__ }}", "may not do"), ("{{ 9 ** (9 ** 9) }}", "processor time")):
        values: dict[str, Any] = {"rationale": jinja if field == "rationale" else "{{ why }}"}
        if field == "chain_of_thought":
            values["chain_of_thought"] = {"target": "{{ rationale }}" + jinja + "{{ target }}"}
        posed, _ = pose_templates([own(**values)], [Variant(chain_of_thought=True)])
        from megatron_xmtf.prompts import RenderLimits

        plan = RenderPlan(tuple(posed), seed=0, limits=RenderLimits(cpu_seconds=1, memory_bytes=256 << 20))
        with pytest.raises(TemplateError, match=rf"'ask\+cot' .*{limit}"):
            list(render_identified_rows([("0", ROW)], plan))
