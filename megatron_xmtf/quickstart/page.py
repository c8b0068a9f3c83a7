"""Draw the outcome of a quickstart as one offline page: losses, languages x tasks, what was done."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_xmtf.evaluation.results import TaskResult
from megatron_xmtf.quickstart.clock import StageClock
from megatron_xmtf.quickstart.outcome import Outcome, task_stories
from megatron_xmtf.report import Html, Page, loss_curves
from megatron_xmtf.report.evaluation import language_task_section

__all__ = ["write_page"]


def write_page(outcome: Outcome, clock: StageClock) -> None:
    """Write `report.html`."""
    stories = task_stories(outcome.before, outcome.after)
    num_others = len(outcome.facts) - 1
    page = Page(
        "Quickstart: finetuned on English, asked in other languages",
        subtitle=f"{outcome.family.title} of {outcome.num_parameters:,} parameters, pretrained on lists and tables in "
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
    page.section("What was learned", *_words(outcome), _story_table(outcome), _probe_table(outcome))
    labels = {code: f"{facts.english_name} ({code})" for code, facts in outcome.facts.items()}
    picture = language_task_section(
        _zero_shot(outcome.after), _zero_shot(outcome.before), language_labels=labels, several_templates=False
    )
    page.section(
        f"{num_others} languages × tasks",
        "Languages that the finetuning did not see. A cell is of few questions (about a dozen): look at columns, rows "
        "and bold cells rather than at single ones. Each question is worded by one of three English templates in turn.",
        *picture,
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
        outcome.family.words_on_before,
        "Picking one of four answers is easier than producing one. The table below shows what the exported model "
        "writes by itself about Monday in some languages: so small a model often slips into another language there.",
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


def _zero_shot(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Leave English out; its two rows stand in the table of tasks."""
    return [result for result in results if result.dataset == "zero_shot"]


def _probe_table(outcome: Outcome) -> Html:
    rows = [
        [
            outcome.facts[probe.language].english_name,
            probe.prompt,
            probe.answer,
            "" if probe.is_right else probe.right_answer,
        ]
        for probe in outcome.probes
    ]
    return Page.table(["language", "prompt", "written greedily in transformers", "right answer, if another"], rows)


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
            f"xmtf generate --hf {root}/hf --prompt '{outcome.probes[0].prompt}'",
        ]
    )
