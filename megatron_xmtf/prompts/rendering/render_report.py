"""What became of the rows under each template, counted and laid out.

template               rendered      blank  no_target
cause_or_effect             100          0          0
cause_or_effect+3shot        98          0          0     2 short_of_exemplars, told below the table
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OUTCOMES", "RenderReport", "TemplateCounts"]

OUTCOMES = (
    *("rendered", "blank", "no_input", "no_target", "no_option", "no_rationale", "no_exemplar", "failed"),
    "left_out",
)
"""Every row comes to one of these under every template."""


@dataclass
class TemplateCounts:
    """What became of the rows under one template; rows = the sum of OUTCOMES."""

    rendered: int = 0
    """Records written."""
    blank: int = 0
    """The template renders nothing at all: it says itself that it does not apply."""
    no_input: int = 0
    no_target: int = 0
    """A row without an answer (a hidden test label)."""
    no_option: int = 0
    """The target is none of the options that would be listed (variants with options)."""
    no_rationale: int = 0
    """The rationale renders empty (variants with a chain of thought)."""
    no_exemplar: int = 0
    """No exemplar is left or fits (few-shot variants)."""
    failed: int = 0
    """An expression of the template raised an error on the row (counted only when errors are skipped), or the
    template was given up before."""
    left_out: int = 0
    """Rows beyond the cap of records for each template."""
    target_not_in_choices: int = 0
    """Rendered all the same; such a record cannot be ranked."""
    short_of_exemplars: int = 0
    """Rendered with fewer exemplars than asked, but at least one."""
    undefined: Counter[str] = field(default_factory=Counter)
    """Names that rendered empty because the row has no such field, and how often."""
    rejected: str | None = None
    """Why the template was given up, if it was."""
    first_failure: str | None = None

    def add(self, other: TemplateCounts) -> None:
        """Add the counts of rows that come later."""
        for name in (*OUTCOMES, "target_not_in_choices", "short_of_exemplars"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.undefined.update(other.undefined)
        self.rejected = self.rejected or other.rejected
        self.first_failure = self.first_failure or other.first_failure

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "undefined": dict(sorted(self.undefined.items()))}


@dataclass
class RenderReport:
    """Counts of a rendering, by template, filled while it runs."""

    rows: int = 0
    templates: dict[str, TemplateCounts] = field(default_factory=dict)

    @property
    def rendered(self) -> int:
        """Records rendered in all."""
        return sum(counts.rendered for counts in self.templates.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        templates = {name: counts.to_json() for name, counts in self.templates.items()}
        return {"rows": self.rows, "rendered": self.rendered, "templates": templates}

    def table(self) -> str:
        """Lay out the counts, one template a line, and what needs attention below."""
        usual = ("rendered", "blank", "no_input", "no_target", "failed")
        all_counts = self.templates.values()
        columns = [name for name in OUTCOMES if name in usual or any(getattr(counts, name) for counts in all_counts)]
        width = max(len("template"), *(len(name) for name in self.templates))
        lines = [f"{'template':<{width}}" + "".join(f"{column:>14}" for column in columns)]
        for name, counts in self.templates.items():
            lines.append(f"{name:<{width}}" + "".join(f"{getattr(counts, column):>14,}" for column in columns))
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks()])

    def remarks(self) -> list[str]:
        """Say what needs attention, template by template."""
        remarks = []
        for name, counts in self.templates.items():
            if counts.undefined:
                listed = ", ".join(f"{field} ({count:,}x)" for field, count in counts.undefined.most_common(5))
                remarks.append(f"{name}: undefined and rendered empty: {listed}")
            if counts.target_not_in_choices:
                remarks.append(f"{name}: {counts.target_not_in_choices:,} targets are not among the answer choices")
            if counts.short_of_exemplars:
                remarks.append(f"{name}: {counts.short_of_exemplars:,} records have fewer exemplars than asked")
            remarks += [text for text in (counts.rejected, counts.first_failure) if text]
        return remarks
