"""Draw the outcome of a quickstart as one offline page: losses, languages x tasks, what was done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from megatron_xmtf.evaluation.results import TaskResult
from megatron_xmtf.quickstart.clock import StageClock
from megatron_xmtf.quickstart.outcome import Outcome, task_stories
from megatron_xmtf.report import Html, Page, loss_curves
from megatron_xmtf.report.evaluation import language_task_section

__all__ = ["write_page"]

ENGLISH_ROWS = {"trained_items": "en-trained", "held_out_items": "en-held-out"}
"""Dataset -> row of the picture; the other datasets stand in the row of their language."""


def write_page(outcome: Outcome, clock: StageClock) -> None:
    """Write `report.html`."""
    stories = task_stories(outcome.before, outcome.after)
    num_others = len(outcome.facts) - 1
    page = Page(
        "Quickstart: finetuned on English, asked in other languages",
        subtitle=f"a BLOOM of {outcome.num_parameters:,} parameters, pretrained on lists and tables in "
        f"{len(outcome.facts)} languages out of CLDR",
    )
    for story in stories:
        before, after = story.zero_shot
        page.key_figure(
            f"{100 * before:.0f} → {100 * after:.0f} %",
            f"{story.task}, mean of {num_others} languages",
            detail=f"chance {100 * story.chance:.0f} % · " + ("crosses" if story.transfers else "does not cross"),
        )
    page.key_figure(
        f"{outcome.logits.max_abs_difference:.1g}", "largest logit difference", detail="our engine − transformers"
    )
    page.section("What was learned", *_words(outcome), _story_table(outcome))
    labels = {code: f"{facts.english_name} ({code})" for code, facts in outcome.facts.items()}
    labels |= {"en-trained": "English, trained on", "en-held-out": "English, held out"}
    page.section(
        "Languages × tasks",
        *language_task_section(
            _by_row(outcome.after), _by_row(outcome.before), language_labels=labels, emphasised=["en-trained"]
        ),
    )
    page.section("Losses", *_loss_figures(outcome))
    page.section("What was done", _stage_table(clock), Page.preformatted(_commands(outcome)))
    page.write(outcome.paths.root / "report.html")


def _words(outcome: Outcome) -> list[str]:
    crossing = [story.task for story in task_stories(outcome.before, outcome.after) if story.transfers]
    staying = [story.task for story in task_stories(outcome.before, outcome.after) if not story.transfers]
    return [
        "The model read plain lists and tables in all languages, then was finetuned on questions and answers in "
        "English alone. It is asked in English about words of every language and picks one of four answers; "
        f"its accuracy rose clearly, and above chance, in: {', '.join(crossing) or 'no task'}. It did not in: "
        f"{', '.join(staying) or 'no task'}.",
        "No text of the pretraining says what comes before an item, so “before” can be learned for the English items "
        "of the finetuning only: a model of this kind does not turn a list round by itself.",
    ]


def _story_table(outcome: Outcome) -> Html:
    headers = ["task", "chance, %", "English, trained on", "English, held out", "other languages", "± stderr", "n"]
    rows = [
        [
            story.task,
            round(100 * story.chance, 1),
            *(f"{100 * a:.0f} → {100 * b:.0f}" for a, b in (story.trained_items, story.held_out_items)),
            f"{100 * story.zero_shot[0]:.1f} → {100 * story.zero_shot[1]:.1f}",
            round(100 * story.stderr, 1),
            story.num_questions,
        ]
        for story in task_stories(outcome.before, outcome.after)
    ]
    return Page.table(headers, rows)


def _by_row(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Give the two kinds of English questions rows of their own."""
    return [replace(result, language=ENGLISH_ROWS.get(result.dataset, result.language)) for result in results]


def _loss_figures(outcome: Outcome) -> list[Html]:
    figures = []
    for name, layout, caption in (
        ("pretrain", outcome.pretraining_layout, "plain texts in all languages"),
        ("finetune", outcome.finetuning_layout, "answers to English prompts"),
    ):
        lines = (outcome.paths.run(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        points = [(float(step["step"]), float(step["loss"])) for step in map(json.loads, lines)]
        figures.append(Page.figure(loss_curves({name: points}), f"{name}: {caption}, at {layout}; nats a token."))
    return figures


def _stage_table(clock: StageClock) -> Html:
    rows = [[name, round(used, 1), clock.budgets[name]] for name, used in clock.seconds.items()]
    return Page.table(["stage", "seconds", "budget"], rows)


def _commands(outcome: Outcome) -> str:
    root = outcome.paths.root
    return "\n".join(
        [
            f"xmtf render --source {root}/data/questions_train.jsonl --templates {root}/data/templates.yaml …",
            f"xmtf preprocess --input {root}/data/finetune.jsonl --tokenizer {root}/tokenizer --output-prefix …",
            f"xmtf train {root}/finetune.yaml --nproc {outcome.finetuning_layout.world_size} output=ANOTHER",
            f"xmtf evaluate --hf {root}/hf --tasks {root}/data/tasks.yaml --output …",
            f"xmtf generate --hf {root}/hf --prompt '{outcome.probe[0]}'",
        ]
    )
