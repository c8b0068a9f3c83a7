"""Hand-computed figures."""

import math

import pytest

from megatron_xmtf.evaluation.aggregate import aggregate_templates, language_means, results_table
from megatron_xmtf.evaluation.metrics import chance_level, is_exact_match, majority_level, share_with_stderr
from megatron_xmtf.evaluation.records import EvaluationExample
from megatron_xmtf.evaluation.results import TaskResult


def example(target: str, *choices: str) -> EvaluationExample:
    return EvaluationExample("?", target, choices, "d", "en", "t", "en", "f:1")


def result(task: str, language: str, template: str, value: float, **other) -> TaskResult:
    fields = {"dataset": "d", "template_language": "en", "metric": "accuracy", "stderr": 0.1, "n": 10}
    return TaskResult(
        task=task, language=language, template=template, value=value, chance=0.25, majority=0.3, **{**fields, **other}
    )


def test_share_and_standard_error() -> None:
    value, stderr = share_with_stderr([True] * 3 + [False])
    assert value == 0.75
    # sample standard deviation of 1 1 1 0 is 0.5, over sqrt(4)
    assert stderr == pytest.approx(0.25)
    assert share_with_stderr([True]) == (1.0, None)
    assert share_with_stderr([False, False]) == (0.0, 0.0)


def test_exact_match_ignores_white_space_and_unicode_composition_only() -> None:
    assert is_exact_match(" caf\u00e9\n", "cafe\u0301")
    assert is_exact_match("a \t b", "a b")
    assert not is_exact_match("A b", "a b") and not is_exact_match("", "a")


def test_chance_with_unequal_choices() -> None:
    assert chance_level([example("a", "a", "b"), example("a", "a", "b", "c", "d")]) == pytest.approx(0.375)
    assert chance_level([example("a")]) == 0.0


def test_majority_is_the_best_constant_answer() -> None:
    # always the text "yes": 3 of 4; always the first position: 2 of 4
    shuffled = [
        example("yes", "yes", "no"),
        example("yes", "no", "yes"),
        example("yes", "no", "yes"),
        example("no", "no", "yes"),
    ]
    assert majority_level(shuffled) == 0.75
    # always the first position: 3 of 3, though every text is another
    assert majority_level([example(c, c, "x") for c in "abc"]) == 1.0
    assert majority_level([example("4"), example("4"), example("5")]) == pytest.approx(2 / 3)


def test_median_over_templates_then_mean_over_tasks() -> None:
    results = [
        result("copa", "id", "t1", 0.5),
        result("copa", "id", "t2", 0.9),
        result("copa", "id", "t3", 0.6),
        result("topics", "id", "t1", 0.2),
        result("copa", "sw", "t1", 0.4),
    ]
    copa = aggregate_templates(results)[0]
    assert (copa.median, copa.best, copa.num_templates) == (0.6, 0.9, 3)
    assert copa.mean == pytest.approx(2.0 / 3)
    assert language_means(results) == pytest.approx({"id": 0.4, "sw": 0.4})
    table = results_table(results).splitlines()
    assert table[0].split() == ["language", "copa", "topics"]
    assert [line.split() for line in table[1:]] == [
        ["chance", "25.0", "25.0"],
        ["id", "60.0", "20.0"],
        ["sw", "40.0", "-"],
        ["mean", "50.0", "20.0"],
    ]


def test_doctest_value_of_the_standard_error() -> None:
    assert share_with_stderr([True, True, True, False, False])[1] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
