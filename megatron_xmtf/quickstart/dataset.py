"""Write the quickstart's data: texts, questions, prompted records and the task file of the evaluation.

facts of 46 languages  ->  data/pretrain.jsonl                               {"text", "language"}
                       ->  data/questions_train.jsonl, ..._evaluate.jsonl    rows of questions
rows x templates.yaml  ->  data/finetune.jsonl                               every question x 3 templates, English
                       ->  data/evaluate_TASK.jsonl, data/tasks.yaml         English x 3; the others x 1 in turn
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_xmtf.files import atomic_write
from megatron_xmtf.prompts import PromptedRecord, Template, load_templates, render_rows
from megatron_xmtf.quickstart.cldr import LANGUAGES, LanguageFacts, load_facts, more_english_countries
from megatron_xmtf.quickstart.plan import Paths, Sizes
from megatron_xmtf.quickstart.questions import (
    NUM_CHOICES,
    TASKS,
    Question,
    evaluation_questions,
    training_questions,
)
from megatron_xmtf.quickstart.texts import pretraining_texts

__all__ = ["QuickstartData", "collect_data", "read_jsonl", "render_prompts"]


@dataclass(frozen=True)
class QuickstartData:
    """What the later stages need; the files hold the same."""

    facts: Mapping[str, LanguageFacts]
    texts: Sequence[str]
    training: Sequence[Question]
    evaluation: Sequence[Question]


def collect_data(sizes: Sizes, paths: Paths) -> QuickstartData:
    """Read the facts, make texts and questions of them, and write those under `data/`."""
    facts = {language: load_facts(language) for language in LANGUAGES[: sizes.languages]}
    english_rows = more_english_countries(sizes.english_countries)
    texts = list(pretraining_texts(facts, english_rows, rounds=sizes.text_rounds, seed=sizes.seed))
    training = training_questions(facts["en"], english_rows, seed=sizes.seed)
    evaluation = evaluation_questions(
        facts, training, questions_per_language=sizes.questions_per_language, seed=sizes.seed
    )
    _write_jsonl(paths.data / "pretrain.jsonl", ({"text": text, "language": language} for language, text in texts))
    _write_jsonl(paths.data / "questions_train.jsonl", (question.to_row() for question in training))
    _write_jsonl(paths.data / "questions_evaluate.jsonl", (question.to_row() for question in evaluation))
    return QuickstartData(facts, [text for _, text in texts], training, evaluation)


def render_prompts(data: QuickstartData, paths: Paths) -> int:
    """Word the questions with the package's English templates and write the records and the task file.

    Returns: the number of records.
    """
    text = resources.files("megatron_xmtf.quickstart").joinpath("templates.yaml").read_text(encoding="utf-8")
    with atomic_write(paths.data / "templates.yaml") as stream:
        stream.write(text)
    templates = load_templates(paths.data / "templates.yaml")
    finetuning: list[PromptedRecord] = []
    evaluation: dict[str, list[PromptedRecord]] = {task: [] for task in TASKS}
    for task in TASKS:
        worded_by = [template for template in templates if template.task == task]
        for number, template in enumerate(worded_by):
            finetuning += _render((question for question in data.training if question.task == task), template)
            asked = [question for question in data.evaluation if question.task == task]
            chosen = [
                question
                for position, question in enumerate(asked)
                if question.language == "en" or position % len(worded_by) == number
            ]
            evaluation[task] += _render(chosen, template)
    _write_jsonl(paths.data / "finetune.jsonl", (record.to_json() for record in finetuning))
    for task, records in evaluation.items():
        _write_jsonl(paths.data / f"evaluate_{task}.jsonl", (record.to_json() for record in records))
    with atomic_write(paths.tasks) as stream:
        yaml.safe_dump({"tasks": [_task_entry(task) for task in TASKS]}, stream, sort_keys=False)
    return len(finetuning) + sum(map(len, evaluation.values()))


def _render(questions: Iterable[Question], template: Template) -> list[PromptedRecord]:
    return list(render_rows((question.to_row() for question in questions), [template], seed=0))


def _task_entry(task: str) -> dict[str, Any]:
    """Return a task of the task file; the three templates of a task are counted together."""
    return {
        "name": task,
        "records": f"evaluate_{task}.jsonl",
        "template": "three_in_turn",
        "template_language": "en",
        "metric": "accuracy",
        # An answer that begins another one ("Mee", "Meer") is told apart by its end.
        "score_eos": True,
        "chance": 1 / NUM_CHOICES,
    }


def _write_jsonl(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as stream:
        for value in values:
            stream.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one of the files that this module wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
