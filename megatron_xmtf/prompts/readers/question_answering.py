"""Read question-answering documents: one question a row, with its article, so that splits can keep articles whole.

SQuAD (XQuAD, MLQA, TyDi QA GoldP)    one json document: data[] articles, paragraphs[], qas[]
row    {"id", "title", "document", "context", "question", "answers": {"text": [...], "answer_start": [...]}}
       and "is_impossible" where the file says it (SQuAD 2.0)
       document: the article's title, else "article 17"; answer_start: characters, as in the file

TyDi QA, the full format              jsonl: one question about one whole article; its offsets count UTF-8 bytes
row    {"id", "language", "title", "document", "context", "question", "passage",
        "answers": {"text": [...], "answer_start": [...]}, "yes_no": [...]}
       document: the article's URL; context: the whole article; passage: the one that the first annotator who
       found any chose, else null; answers: the distinct minimal answers, answer_start in characters of context;
       yes_no: the annotators' YES and NO
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, Reject, Row
from megatron_xmtf.prompts.readers.json_rows import read_json_document, read_jsonl
from megatron_xmtf.prompts.readers.streams import Lines

__all__ = ["read_squad", "read_tydiqa"]


def read_squad(path: Path, lines: Lines, reject: Reject) -> LocatedRows:
    """Read the questions of a SQuAD document, in its order.

    Raises:  RecordError: no list of articles under `data`.
    """
    value = read_json_document(path, lines)
    articles = value.get("data") if isinstance(value, dict) else None
    if not isinstance(articles, list):
        raise RecordError(f"{path} is no SQuAD document: an object with a list of articles under `data` is needed.")
    for number, article in enumerate(articles):
        where = f"{path}: data[{number}]"
        try:
            paragraphs = _field(article, "paragraphs", list, where)
        except BadRowError as error:
            reject(error)
            continue
        title = article.get("title") or None
        for index, paragraph in enumerate(paragraphs):
            for at, row in _squad_paragraph(paragraph, f"{where}.paragraphs[{index}]", reject):
                yield at, {"id": row.pop("id"), "title": title, "document": title or f"article {number}", **row}


def _squad_paragraph(paragraph: Any, where: str, reject: Reject) -> LocatedRows:
    try:
        context = _field(paragraph, "context", str, where)
        questions = _field(paragraph, "qas", list, where)
    except BadRowError as error:
        reject(error)
        return
    for position, question in enumerate(questions):
        at = f"{where}.qas[{position}]"
        try:
            row = _squad_row(question, context, at)
        except BadRowError as error:
            reject(error)
            continue
        yield at, row


def _squad_row(question: Any, context: str, where: str) -> Row:
    row: Row = {"id": str(_field(question, "id", (str, int), where)), "context": context}
    row["question"] = _field(question, "question", str, where)
    texts, starts = [], []
    answers = question.get("answers", [])
    if not isinstance(answers, list):
        raise BadRowError("not of the format", f"{where}.answers is a {type(answers).__name__}; a list is needed.")
    for index, answer in enumerate(answers):
        texts.append(_field(answer, "text", str, f"{where}.answers[{index}]"))
        starts.append(_field(answer, "answer_start", int, f"{where}.answers[{index}]"))
    row["answers"] = {"text": texts, "answer_start": starts}
    if "is_impossible" in question:
        row["is_impossible"] = _field(question, "is_impossible", bool, where)
    return row


def read_tydiqa(path: Path, lines: Lines, reject: Reject) -> LocatedRows:
    """Read the questions of TyDi QA's full format, with the annotators' answers as text."""
    for where, row in read_jsonl(path, lines, reject):
        try:
            found = _tydiqa_row(row, where)
        except BadRowError as error:
            reject(error)
            continue
        yield where, found


def _tydiqa_row(row: Row, where: str) -> Row:
    context = _field(row, "document_plaintext", str, where)
    encoded = context.encode("utf-8")
    candidates = _field(row, "passage_answer_candidates", list, where)
    passage: str | None = None
    answers: dict[tuple[int, str], None] = {}
    yes_no: list[str] = []
    for index, annotation in enumerate(_field(row, "annotations", list, where) if "annotations" in row else []):
        at = f"{where}: annotations[{index}]"
        chosen = _field(_field(annotation, "passage_answer", dict, at), "candidate_index", int, at)
        if chosen >= len(candidates):
            raise BadRowError("offset outside the text", f"{at}: passage {chosen} of {len(candidates)}.")
        if chosen >= 0 and passage is None:
            passage = _span(encoded, candidates[chosen], at)[1]
        minimal = _field(annotation, "minimal_answer", dict, at)
        if _field(minimal, "plaintext_start_byte", int, at) >= 0:
            start, text = _span(encoded, minimal, at)
            answers[start, text] = None
        if annotation.get("yes_no_answer") in ("YES", "NO"):
            yes_no.append(annotation["yes_no_answer"])
    return {
        "id": str(_field(row, "example_id", (str, int), where)),
        "language": _field(row, "language", str, where),
        "title": _field(row, "document_title", str, where),
        "document": _field(row, "document_url", str, where),
        "context": context,
        "question": _field(row, "question_text", str, where),
        "passage": passage,
        "answers": {"text": [text for _, text in answers], "answer_start": [start for start, _ in answers]},
        "yes_no": yes_no,
    }


def _span(encoded: bytes, offsets: Any, where: str) -> tuple[int, str]:
    """Cut a span of bytes out of a text: (where it starts in characters, its text)."""
    start = _field(offsets, "plaintext_start_byte", int, where)
    end = _field(offsets, "plaintext_end_byte", int, where)
    if not 0 <= start <= end <= len(encoded):
        message = f"{where}: bytes {start} to {end} of a text of {len(encoded):,} bytes."
        raise BadRowError("offset outside the text", message)
    try:
        return len(encoded[:start].decode("utf-8")), encoded[start:end].decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{where}: bytes {start} to {end} begin or end inside a character."
        raise BadRowError("offset inside a character", message) from error


def _field(value: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        what = "is missing" if not isinstance(value, dict) or name not in value else f"is {str(found)[:40]!r}"
        raise BadRowError(
            "not of the format", f"{where}: `{name}` {what}; the format says otherwise (docs/sources.md)."
        )
    return found
