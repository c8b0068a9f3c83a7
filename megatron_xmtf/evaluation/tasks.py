"""Load tasks whole: the task file, and every record that it names, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.evaluation.records import EvaluationExample, read_examples
from megatron_xmtf.evaluation.task_file import TaskSettings, read_task_file

__all__ = ["Task", "load_tasks"]


@dataclass(frozen=True)
class Task:
    """A task with its examples, ready to be asked."""

    settings: TaskSettings
    examples: tuple[EvaluationExample, ...]

    def groups(self) -> dict[tuple[str, str, str, str], list[int]]:
        """Positions of the examples of each group, in the order of the file."""
        positions: dict[tuple[str, str, str, str], list[int]] = {}
        for position, example in enumerate(self.examples):
            positions.setdefault(example.group, []).append(position)
        return positions


def load_tasks(paths: Iterable[Path | str]) -> list[Task]:
    """Read task files and every record they name, so that a fault shows before a model is loaded.

    Raises:  MissingError: a task file or a file it names does not exist. ConfigError: unknown key or metric, a task
             twice. RecordError: a record that cannot be asked; names file and line.
    """
    tasks: list[Task] = []
    seen: dict[tuple[str, ...], Path] = {}
    for path in map(Path, paths):
        for settings in read_task_file(path):
            task = Task(settings, tuple(read_examples(settings, directory=path.parent)))
            for group in task.groups():
                key = (settings.name, *group, settings.metric, settings.normalization)
                if key in seen:
                    raise ConfigError(
                        f"{path}: task {settings.name!r} measures {settings.metric} of dataset, language, template "
                        f"{group[:3]!r} a second time (first in {seen[key]}); give it another name or template."
                    )
                seen[key] = path
            tasks.append(task)
    if not tasks:
        raise ConfigError("no task file was given; name at least one.")
    return tasks
