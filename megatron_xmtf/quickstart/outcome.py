"""What a quickstart found: figures by task and language before and after, as `summary.json` and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megatron_xmtf.conversion.verify_logits import LogitsComparison
from megatron_xmtf.evaluation.results import TaskResult
from megatron_xmtf.quickstart.cldr import LanguageFacts
from megatron_xmtf.quickstart.clock import StageClock
from megatron_xmtf.quickstart.families import Family
from megatron_xmtf.quickstart.plan import Layout, Paths, Sizes
from megatron_xmtf.quickstart.questions import TASKS
from megatron_xmtf.training.trainer import TrainingResult

__all__ = ["Outcome", "Probe", "TaskStory", "build_summary", "closing_words", "task_stories"]

NUM_NAMED = 3
"""Best and worst languages that are named."""


@dataclass(frozen=True)
class Probe:
    """A prompt, and what the exported model writes behind it in transformers."""

    language: str
    prompt: str
    answer: str
    right_answer: str

    @property
    def is_right(self) -> bool:
        """Whether the two answers are the same text."""
        return self.answer == self.right_answer


@dataclass(frozen=True)
class Outcome:
    """All that the stages handed back."""

    family: Family
    sizes: Sizes
    paths: Paths
    pretraining_layout: Layout
    finetuning_layout: Layout
    num_parameters: int
    facts: Mapping[str, LanguageFacts]
    pretrained: TrainingResult
    finetuned: TrainingResult
    before: Sequence[TaskResult]
    after: Sequence[TaskResult]
    logits: LogitsComparison
    probes: Sequence[Probe]


@dataclass(frozen=True)
class TaskStory:
    """One task: (before, after) as fractions."""

    task: str
    chance: float
    trained_items: tuple[float, float]
    """English, the questions of the finetuning."""
    held_out_items: tuple[float, float]
    """English, items that the finetuning did not ask about."""
    zero_shot: tuple[float, float]
    """Mean over the languages that the finetuning did not see."""
    num_questions: int
    """Zero-shot questions in all."""
    languages: tuple[tuple[str, float, float], ...]
    """(language, before, after) of the zero-shot languages, best first."""

    @property
    def stderr(self) -> float:
        """Standard error of the zero-shot accuracy after finetuning, as if its questions were independent."""
        value = self.zero_shot[1]
        return math.sqrt(value * (1 - value) / self.num_questions)

    @property
    def transfers(self) -> bool:
        """Whether zero-shot accuracy rose, and ended above chance, by more than two standard errors of a difference."""
        before, after = self.zero_shot
        margin = 2 * math.sqrt(2) * max(self.stderr, 1e-9)
        return after - before > margin and after - self.chance > margin


def task_stories(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> list[TaskStory]:
    """Pair the two evaluations task by task."""
    found = {(result.task, result.dataset, result.language): result for result in before}
    stories = []
    for task in TASKS:
        own = [result for result in after if result.task == task]
        pairs = {
            (result.dataset, result.language): (found[task, result.dataset, result.language].value, result.value)
            for result in own
        }
        languages = [(language, *pair) for (dataset, language), pair in pairs.items() if dataset == "zero_shot"]
        stories.append(
            TaskStory(
                task=task,
                chance=own[0].chance,
                trained_items=pairs["trained_items", "en"],
                held_out_items=pairs["held_out_items", "en"],
                zero_shot=(fmean(entry[1] for entry in languages), fmean(entry[2] for entry in languages)),
                num_questions=sum(result.n for result in own if result.dataset == "zero_shot"),
                languages=tuple(sorted(languages, key=lambda entry: (-entry[2], entry[0]))),
            )
        )
    return stories


def build_summary(outcome: Outcome, clock: StageClock) -> dict[str, Any]:
    """Return what `summary.json` holds; accuracies are fractions, seconds are wall-clock."""
    found = {(result.task, result.dataset, result.language): result for result in outcome.before}
    accuracy = [
        {
            "task": result.task,
            "language": result.language,
            "language_name": outcome.facts[result.language].english_name,
            "dataset": result.dataset,
            "before": found[result.task, result.dataset, result.language].value,
            "after": result.value,
            "stderr": result.stderr,
            "n": result.n,
            "chance": result.chance,
            "majority": result.majority,
        }
        for result in outcome.after
    ]
    return {
        "family": outcome.family.name,
        "seconds": {
            "total": round(clock.total_seconds, 2),
            "stages": {name: round(used, 2) for name, used in clock.seconds.items()},
            "budgets": clock.budgets,
        },
        "languages": len(outcome.facts),
        "model": {
            "parameters": outcome.num_parameters,
            "vocab_size": outcome.sizes.vocab_size,
            "hidden_size": outcome.sizes.hidden_size,
            "num_layers": outcome.sizes.num_layers,
        },
        "pretrain": _training(outcome.pretrained, outcome.pretraining_layout),
        "finetune": _training(outcome.finetuned, outcome.finetuning_layout),
        "tasks": {story.task: _task(story) for story in task_stories(outcome.before, outcome.after)},
        "accuracy": accuracy,
        "max_abs_logit_difference": outcome.logits.max_abs_difference,
        "probes": [asdict(probe) for probe in outcome.probes],
        "files": {
            "model": str(outcome.paths.hf),
            "report": str(outcome.paths.root / "report.html"),
            "pretrain_config": str(outcome.paths.config("pretrain")),
            "finetune_config": str(outcome.paths.config("finetune")),
        },
    }


def closing_words(outcome: Outcome, clock: StageClock) -> str:
    """Say in a few lines what was learned and what to look at next."""
    root = outcome.paths.root
    stories = task_stories(outcome.before, outcome.after)
    num_languages = len(outcome.facts) - 1
    lines = [
        "",
        f"Finetuned on English alone; percent right before -> after (chance {100 * stories[0].chance:.0f}):",
        f"  {'task':<10} {'English,':>12} {'English,':>12} {f'{num_languages} other':>12}",
        f"  {'':<10} {'trained on':>12} {'held out':>12} {'languages':>12}",
    ]
    for story in stories:
        pairs = (story.trained_items, story.held_out_items, story.zero_shot)
        cells = "".join(f" {_percent(pair):>12}" for pair in pairs)
        verdict = "crosses languages" if story.transfers else "does not cross"
        lines.append(f"  {story.task:<10}{cells}   {verdict}; {_extremes(story)}")
    difference = outcome.logits.max_abs_difference
    lines += [
        "",
        f"The exported model gives the same logits in transformers (largest difference {difference:.1g}).",
        f"{clock.total_seconds:.0f} s in all. Next:",
        f"  {root / 'report.html'}    pictures: losses, every language and task",
        f"  xmtf generate --hf {root / 'hf'} --prompt '{outcome.probes[0].prompt}'",
        f"  xmtf inspect {root / 'data' / 'finetune'} --show 3    what the model was finetuned on",
        f"  {root / 'finetune.yaml'}    the run's configuration: change it, give it another output, `xmtf train` it",
    ]
    return "\n".join(lines)


def _training(result: TrainingResult, layout: Layout) -> dict[str, Any]:
    return {
        "steps": result["last_step"],
        "first_loss": result["first_loss"],
        "last_loss": result["last_loss"],
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "data_parallel_size": layout.data_parallel_size,
    }


def _task(story: TaskStory) -> dict[str, Any]:
    def pair(values: tuple[float, float]) -> dict[str, float]:
        return {"before": values[0], "after": values[1]}

    return {
        "chance": story.chance,
        "english_trained_items": pair(story.trained_items),
        "english_held_out_items": pair(story.held_out_items),
        "zero_shot_languages": {**pair(story.zero_shot), "n": story.num_questions, "stderr": story.stderr},
        "transfers": story.transfers,
        "best_languages": [entry[0] for entry in story.languages[:NUM_NAMED]],
        "worst_languages": [entry[0] for entry in story.languages[::-1][:NUM_NAMED]],
    }


def _percent(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.0f} -> {100 * pair[1]:.0f}"


def _extremes(story: TaskStory) -> str:
    """Name the languages that do best and worst after the finetuning."""

    def words(entries: Sequence[tuple[str, float, float]]) -> str:
        return ", ".join(f"{language} {100 * after:.0f}" for language, _, after in entries)

    return f"best {words(story.languages[:NUM_NAMED])}; worst {words(story.languages[::-1][:NUM_NAMED])}"
