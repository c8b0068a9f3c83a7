"""What the guards say of a run's data: duplicates, near duplicates, texts of the tasks that it is evaluated on.

data.guards       the plan says
off               off: not looked for
report            how many there are; the run reads them all the same
drop              how many there are; the run does not read them
(report, but the model and its tokenizer are not there yet, or no task is named)    not checked, and why
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards import GuardFlags
from megatron_xmtf.data.guards.settings import BITS
from megatron_xmtf.evaluation.guarding import report_guards

__all__ = ["FLAG_BITS", "GuardPlan", "describe_guards", "find_flags"]

FLAG_BITS = {
    "duplicates": BITS["duplicates"],
    "near_duplicates": BITS["near_duplicates"],
    "contaminated": BITS["contamination"],
}
"""Column of the plan -> bits of an example's flags."""
GUARD_OF = {"duplicates": "duplicates", "near_duplicates": "near_duplicates", "contaminated": "contamination"}


class GuardPlan(TypedDict):
    """Guards of a run."""

    settings: dict[str, str]
    """Guard -> off, report or drop, as the configuration says."""
    not_checked: dict[str, str]
    """Guard -> why it was to be looked for and was not."""
    checked: list[str]
    """Columns that the lines of the plan have: duplicates, near_duplicates, contaminated."""
    contamination: list[dict[str, Any]]
    """By dataset, language and task: training examples that hold a text of the task, exact or by n-grams."""
    tasks: list[dict[str, Any]]
    """By task and its language: texts, and how many were found in the training data."""


def find_flags(config: RunConfig, datasets: Sequence[ExampleDataset]) -> tuple[GuardFlags | None, str]:
    """Scan, or open an earlier scan; where only a report is wanted and the model is not there yet, do without.

    Returns: (flags, why there are none though some were wanted). To drop something, the model must be there.
    Raises:  as `report_guards`.
    """
    guards = config.data.guards
    wanted = {guards.duplicates, guards.near_duplicates, guards.contamination}
    if "report" in wanted and "drop" not in wanted and not Path(config.tokenizer_source).is_dir():
        return None, f"needs the tokenizer of {config.tokenizer_source}, which is not there"
    return report_guards(config, datasets), ""


def describe_guards(config: RunConfig, flags: GuardFlags | None, why_none: str) -> GuardPlan:
    """Describe what was looked for and what was found."""
    settings = {name: str(getattr(config.data.guards, name)) for name in BITS}
    not_checked = {}
    for name, action in settings.items():
        if action != "off" and flags is None:
            not_checked[name] = why_none
        elif action != "off" and name == "contamination" and not config.evaluation.tasks:
            not_checked[name] = "evaluation.tasks names no task"
    checked = [column for column, name in GUARD_OF.items() if settings[name] != "off" and name not in not_checked]
    report: dict[str, Any] = {} if flags is None else flags.report
    return {
        "settings": settings,
        "not_checked": not_checked,
        "checked": checked,
        "contamination": report.get("contamination", []),
        "tasks": report.get("tasks", []),
    }
