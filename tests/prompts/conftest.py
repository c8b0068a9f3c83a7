"""Real rows beside the real promptsource templates that were written for such rows."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def squad_rows(path: Path) -> Iterator[dict[str, Any]]:
    """SQuAD's nested form as the flat rows that templates are written for."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                texts = [answer["text"] for answer in question["answers"]]
                starts = [answer["answer_start"] for answer in question["answers"]]
                yield {
                    "id": question["id"],
                    "title": article.get("title", "none"),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {"text": texts, "answer_start": starts},
                }


@pytest.fixture(scope="session")
def real_pairs(shared_data: Path) -> list[tuple[Path, list[dict[str, Any]]]]:
    """(template file, its rows) for six kinds of task in twenty languages."""
    root = shared_data / "promptsource_templates" / "xp3mt" / "templates"
    pairs: list[tuple[Path, Iterator[dict[str, Any]]]] = []
    for language in ("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"):
        rows_language = "it" if language == "en" else language
        rows = json_lines(shared_data / "xcopa" / "data" / rows_language / f"val.{rows_language}.jsonl")
        pairs.append((root / "xcopa" / language / "templates.yaml", rows))
    for language in ("en", "es", "ar", "zh", "hi"):
        rows = squad_rows(shared_data / "xquad" / f"xquad.{language}.json")
        pairs.append((root / "xquad" / f"xquad.{language}" / "templates.yaml", rows))
    english = shared_data / "xquad" / "xquad.en.json"
    pairs.append((root / "mlqa" / "mlqa.en.en" / "templates.yaml", squad_rows(english)))
    pairs.append((root / "squad_v2" / "templates.yaml", squad_rows(english)))
    labels = {"e": 0, "n": 1, "c": 2}
    nli = ({**row, "label": labels[row["label"]]} for row in json_lines(shared_data / "indonli" / "val.jsonl"))
    pairs.append((root / "xnli" / "en" / "templates.yaml", nli))
    return [(path, list(islice(rows, 30))) for path, rows in pairs]
