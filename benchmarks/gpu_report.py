"""What benchmarks/gpu.py found, as JSON for programs and as Markdown for people, with what is asked in front."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MFU, TRANSFORMERS, FLEX, FLASH, HEAD = 50.0, 3.0, 1.0, 1 / 1.3, 10.0
"""What is asked: percent of the data sheet's peak; times the speed of `transformers`, FlexAttention, flash SDPA without
ALiBi; times less memory than the plain head and loss."""


def write(directory: Path, results: dict[str, Any]) -> Path:
    """Write both files; return their path without its ending."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("gpu_" + re.sub(r"[^a-z0-9]+", "_", results["device"].lower()).strip("_"))
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(worded(results), encoding="utf-8")
    return path


def worded(results: dict[str, Any]) -> str:
    """Word the results as Markdown: one table of what is asked, one table a part."""
    known = ", ".join(f"{key} {results[key]}" for key in ("date", "torch", "triton", "transformers", "cuda"))
    lines = [f"# {results['device']}", "", known, ""]
    if results["smoke"]:
        lines += ["**Toy sizes: the figures mean nothing.**", ""]
    asked = list(compare_with_goals({name: part["rows"] for name, part in results["parts"].items()}))
    if asked:
        lines += ["## Asked and found", "", *table(asked), ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", ""]
        if "error" in part:
            lines += [f"`{part['error']}`", ""]
        if part.get("note"):
            lines += [part["note"], ""]
        if part["rows"]:
            lines += [*table(part["rows"]), ""]
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """Word rows as a table with every column that one of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*head, *("| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows)]


def cell(value: Any) -> str:
    """Word one value of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


def compare_with_goals(parts: dict[str, list[Row]]) -> Iterator[Row]:
    """Set what was measured beside what is asked; what was not measured has no row."""
    for name, rows in parts.items():
        if name.startswith("step "):
            sides = {row["side"]: row for row in rows if "step ms" in row}
            ours, peer = sides.get("ours"), sides.get("transformers")
            # At 560m nearly half of the model's FLOPs are the output layer's: nothing is asked there.
            if ours and ours["MFU %"] is not None and name != "step 560m":
                yield goal(name, "MFU %", ours["MFU %"], MFU)
            if ours and peer:
                yield goal(name, "tokens/s, times transformers", ours["tokens/s"] / peer["tokens/s"], TRANSFORMERS)
    yield from compare_attention(parts.get("attention", []))
    memory = {row["side"]: row["GiB"] for row in parts.get("head", []) if row.get("GiB")}
    if {"fused", "plain"} <= memory.keys():
        yield goal("head", "memory, times less than plain", memory["plain"] / memory["fused"], HEAD)


def compare_attention(rows: list[Row]) -> Iterator[Row]:
    """Set attention, forward and backward, beside its peers on the same rows."""
    known = {(row["model"], row["rows"], row["side"]): row["both ms"] for row in rows if "both ms" in row}
    for (model, pattern, side), theirs in known.items():
        asked = {"FlexAttention": FLEX, "flash-attn varlen": FLASH, "flash SDPA, no ALiBi": FLASH}.get(side)
        ours = known.get((model, pattern, "fused"))
        if asked is not None and ours is not None:
            yield goal(f"attention {model}, {pattern}", f"speed, times {side}", theirs / ours, asked)


def goal(where: str, what: str, found: float, asked: float) -> Row:
    """Word one goal."""
    return {"where": where, "what": what, "found": found, "asked": asked, "met": found >= asked}
