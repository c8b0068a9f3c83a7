"""The record that rendering makes: one row, worded by one template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["RECORD_FIELDS", "PromptedRecord"]

RECORD_FIELDS = ("dataset", "config", "split", "language", "task")
"""What the caller, the row or the template says of a record."""
JSON_FIELDS = (
    *("inputs", "targets", "id", "document", "dataset", "config", "split", "language"),
    *("template", "template_language", "task", "choices"),
)


@dataclass(frozen=True)
class PromptedRecord:
    """One row worded by one template."""

    inputs: str
    targets: str
    id: str
    template: str
    """Name of the template, with that of the variant: `cause_or_effect+3shot`."""
    document: str | None = None
    """What the row is a part of, where the row says it (its field `document`): splits never tear it apart."""
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    language: str | None = None
    template_language: str | None = None
    task: str | None = None
    choices: list[str] | None = None
    """Answer choices, or their letters where the target is one; None: open generation, or a chain of thought."""
    choice_index: int | None = None
    """Position of `targets` among `choices`; None: open generation, or not among them (counted)."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in a jsonl file; fields that are not known are left out."""
        values = {name: getattr(self, name) for name in JSON_FIELDS}
        return {name: value for name, value in values.items() if value is not None}
