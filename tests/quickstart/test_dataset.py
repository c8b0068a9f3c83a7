"""Texts and questions: counts, determinism, and nothing of the evaluation in the finetuning."""

import json

import pytest

from megatron_xmtf.quickstart.cldr import LANGUAGES, load_facts, more_english_countries
from megatron_xmtf.quickstart.dataset import collect_data, read_jsonl, render_prompts
from megatron_xmtf.quickstart.plan import Paths, Sizes
from megatron_xmtf.quickstart.questions import TASKS, evaluation_questions, training_questions
from megatron_xmtf.quickstart.texts import pretraining_texts


@pytest.fixture(scope="module")
def facts():
    return {language: load_facts(language) for language in LANGUAGES}


@pytest.fixture(scope="module")
def training(facts):
    return training_questions(facts["en"], more_english_countries(100), seed=3)


@pytest.fixture(scope="module")
def evaluation(facts, training):
    return evaluation_questions(facts, training, questions_per_language=12, seed=3)


def test_every_language_is_asked_every_task(evaluation) -> None:
    counts = {}
    for question in evaluation:
        counts[question.task, question.dataset, question.language] = (
            counts.get((question.task, question.dataset, question.language), 0) + 1
        )
    for task in TASKS:
        assert all(counts[task, "zero_shot", language] == 12 for language in LANGUAGES if language != "en")
    assert counts["next", "trained_items", "en"] == 13 and counts["next", "held_out_items", "en"] == 6
    assert counts["currency", "trained_items", "en"] == 16 and counts["currency", "held_out_items", "en"] == 8


def test_answers_are_right(facts, evaluation) -> None:
    by_item = {(q.task, q.language, q.item): q.answer for q in evaluation}
    for (task, language, item), answer in by_item.items():
        own = facts[language]
        if task in ("next", "before"):
            items = own.months if item in own.months else own.days
            step = 1 if task == "next" else -1
            assert items[(items.index(item) + step) % len(items)] == answer
        else:
            [row] = [row for row in own.country_rows if row[0] == item]
            assert answer == row[1 if task == "continent" else 2]


def test_four_different_choices_with_the_answer_anywhere(evaluation) -> None:
    positions = [0, 0, 0, 0]
    for question in evaluation:
        assert len(set(question.choices)) == 4 and question.answer in question.choices
        assert question.task not in ("next", "before") or question.item not in question.choices
        positions[question.choices.index(question.answer)] += 1
    assert all(abs(count / len(evaluation) - 0.25) < 0.04 for count in positions)


def test_finetuning_is_english_and_says_nothing_of_held_out_items(facts, training, evaluation) -> None:
    assert {question.language for question in training} == {"en"}
    asked = {(question.task, question.item) for question in training}
    told = {(question.task, question.item, question.answer) for question in training}
    for question in evaluation:
        if question.dataset == "held_out_items":
            assert (question.task, question.item) not in asked
        elif question.dataset == "zero_shot":
            assert (question.task, question.item, question.answer) not in told
        else:
            assert (question.task, question.item, question.answer) in told


def test_texts_are_in_every_language_and_never_tell_what_comes_before(facts) -> None:
    texts = list(pretraining_texts(facts, more_english_countries(100), rounds=30, seed=3))
    assert len(texts) == 30 * (45 + 4)
    assert {language for language, _ in texts} == set(LANGUAGES)
    for language, text in texts:
        assert "?" not in text and "before" not in text
        assert not (facts[language].days[1] in text and f"{facts[language].days[1]}, {facts[language].days[0]}" in text)


def test_the_same_seed_gives_the_same_and_another_seed_other(facts, training) -> None:
    rows = more_english_countries(100)
    first, again, other = (list(pretraining_texts(facts, rows, rounds=3, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert training == training_questions(facts["en"], rows, seed=3) != training_questions(facts["en"], rows, seed=4)


def test_records_are_rendered_in_english_and_zero_shot_ones_once(tmp_path) -> None:
    sizes = Sizes(languages=3, text_rounds=2, questions_per_language=6, english_countries=5)
    paths = Paths(tmp_path)
    data = collect_data(sizes, paths)
    num_records = render_prompts(data, paths)
    finetuning = read_jsonl(paths.data / "finetune.jsonl")
    assert len(finetuning) == 3 * len(data.training)
    assert {record["language"] for record in finetuning} == {"en"}
    assert {"inputs": "What comes after January?", "targets": "February"}.items() <= finetuning[0].items()
    evaluated = [record for task in TASKS for record in read_jsonl(paths.data / f"evaluate_{task}.jsonl")]
    assert num_records == len(finetuning) + len(evaluated)
    assert {record["template_language"] for record in evaluated} == {"en"}
    zero_shot = [record for record in evaluated if record["dataset"] == "zero_shot"]
    assert len(zero_shot) == len({record["id"] for record in zero_shot}) == 4 * 2 * 6
    assert len({record["template"] for record in zero_shot}) == 12
    assert all(json.dumps(record) and record["targets"] in record["choices"] for record in evaluated)
