"""Ask a model every question of some tasks: all choices are ranked in one go, then all texts generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import TokenizerError
from megatron_xmtf.evaluation.backend import Backend
from megatron_xmtf.evaluation.generate import generate_texts
from megatron_xmtf.evaluation.metrics import chance_level, is_exact_match, majority_level, share_with_stderr
from megatron_xmtf.evaluation.rank import RankedPairs, best_choices, build_pairs
from megatron_xmtf.evaluation.results import TaskResult
from megatron_xmtf.evaluation.task_file import GenerationSettings
from megatron_xmtf.evaluation.tasks import Task
from megatron_xmtf.progress import Progress

__all__ = ["check_vocabulary", "evaluate_tasks"]

logger = logging.getLogger(__name__)


def evaluate_tasks(
    tasks: Sequence[Task], *, backend: Backend, tokenizer: Tokenizer, show_progress: bool = True
) -> list[TaskResult]:
    """Return one result for each task and each dataset, language and template of its records.

    On the parallel engine every rank calls this with the same tasks and gets the same results.

    Args:    show_progress: draw bars (rank 0 alone does).
    Raises:  TokenizerError: the tokenizer has ids that the model lacks. RecordError: a text without a token.
    """
    check_vocabulary(tokenizer, backend)
    ranked = [task for task in tasks if task.settings.metric == "accuracy"]
    answered = _rank(ranked, backend=backend, tokenizer=tokenizer, show_progress=show_progress)
    generated = [task for task in tasks if task.settings.metric == "exact_match"]
    answered.update(_generate(generated, backend=backend, tokenizer=tokenizer, show_progress=show_progress))
    return [result for task in tasks for result in _results(task, *answered[id(task)])]


def check_vocabulary(tokenizer: Tokenizer, backend: Backend) -> None:
    """Check that every id of the tokenizer has an embedding.

    Raises:  TokenizerError: it has more ids than the model.
    """
    if tokenizer.vocab_size > backend.vocab_size:
        raise TokenizerError(
            f"tokenizer {tokenizer.directory} has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary is "
            f"{backend.vocab_size}; use the tokenizer that the model was trained with."
        )


def _rank(
    tasks: Sequence[Task], *, backend: Backend, tokenizer: Tokenizer, show_progress: bool
) -> dict[int, tuple[list[bool], set[int]]]:
    """Rank the choices of all tasks; return by task whether each example is right, and which were truncated."""
    parts: list[RankedPairs] = [
        build_pairs(
            task.examples,
            settings=task.settings,
            tokenizer=tokenizer,
            max_length=backend.max_length,
            inputs_end_with_eos=backend.inputs_end_with_eos,
        )
        for task in tasks
    ]
    pairs = [pair for part in parts for pair in part.pairs]
    with Progress("evaluate", total=len(pairs), unit="choices", enabled=show_progress and bool(pairs)) as progress:
        scores = backend.score(pairs, advance=progress.advance)
    answered, start = {}, 0
    for task, part in zip(tasks, parts, strict=True):
        own = scores[start : start + len(part.pairs)]
        start += len(part.pairs)
        best = best_choices(part, own, normalization=task.settings.normalization)
        right = [example.choices[choice] == example.target for example, choice in zip(task.examples, best, strict=True)]
        answered[id(task)] = (right, part.truncated)
    return answered


def _generate(
    tasks: Sequence[Task], *, backend: Backend, tokenizer: Tokenizer, show_progress: bool
) -> dict[int, tuple[list[bool], set[int]]]:
    """Generate the answers of all tasks; return the same as `_rank`."""
    answered = {}
    total = sum(len(task.examples) for task in tasks)
    with Progress("generate", total=total, unit="answers", enabled=show_progress and bool(tasks)) as progress:
        for task in tasks:
            generation = task.settings.generation or GenerationSettings()
            texts, truncated = generate_texts(
                [example.inputs for example in task.examples],
                backend=backend,
                tokenizer=tokenizer,
                max_new_tokens=generation.max_new_tokens,
                stop=generation.stop,
                inputs_eos=task.settings.inputs_eos,
                advance=progress.advance,
            )
            right = [is_exact_match(text, example.target) for text, example in zip(texts, task.examples, strict=True)]
            answered[id(task)] = (right, truncated)
    return answered


def _results(task: Task, right: Sequence[bool], truncated: set[int]) -> list[TaskResult]:
    """Measure each group of a task by itself."""
    settings, results = task.settings, []
    if truncated:
        logger.warning(
            "task %s: %d of %d inputs lost tokens on the left to fit the model",
            settings.name,
            len(truncated),
            len(task.examples),
        )
    for (dataset, language, template, template_language), positions in task.groups().items():
        examples = [task.examples[position] for position in positions]
        value, stderr = share_with_stderr([right[position] for position in positions])
        results.append(
            TaskResult(
                task=settings.name,
                dataset=dataset,
                language=language,
                template=template,
                template_language=template_language,
                metric=settings.metric,
                value=value,
                stderr=stderr,
                n=len(positions),
                chance=settings.chance if settings.chance is not None else chance_level(examples),
                majority=majority_level(examples),
                normalization=settings.normalization,
                num_truncated=len(truncated.intersection(positions)),
            )
        )
    return results
