"""The template files of examples/ on the data they are for, read here without the package's own readers."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.prompts import (
    PromptedRecord,
    RenderReport,
    Template,
    load_templates,
    render_identified_rows,
    render_rows,
)
from megatron_xmtf.prompts.rendering.chunk_renderer import RenderPlan
from megatron_xmtf.prompts.templates.variants import PLAIN, Variant, pose_templates
from tests.prompts.conftest import json_lines, squad_rows

TEMPLATES = Path(__file__).parents[2] / "examples" / "templates"
FILES = sorted(path.name for path in TEMPLATES.glob("*.yaml"))
Row = dict[str, Any]


def table_rows(path: Path, delimiter: str) -> list[Row]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def plain_rows(path: Path, names: tuple[str, ...]) -> list[Row]:
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


def exam_rows(path: Path) -> list[Row]:
    with tarfile.open(path) as archive:
        member = archive.extractfile(archive.getnames()[0])
        assert member is not None
        return [json.loads(line) for line in member]


def aligned_rows(directory: Path, source: str, target: str, names: tuple[str, str]) -> list[Row]:
    first, second = (
        (directory / f"newstest2019-{name}.txt").read_text(encoding="utf-8").splitlines() for name in (source, target)
    )
    pairs = zip(first, second, strict=True)
    return [{"source": a, "target": b, "source_language": names[0], "target_language": names[1]} for a, b in pairs]


def rows_for(file: str, data: Path) -> list[Row]:
    """Real rows of the set that a template file is for."""
    if file == "gsm8k.yaml":
        return list(json_lines(data / "gsm8k" / "train.jsonl"))
    if file == "mgsm.yaml":
        return plain_rows(data / "mgsm" / "mgsm_es.tsv", ("question", "answer"))
    if file == "flan_cot.yaml":
        return plain_rows(data / "flan_cot" / "sensemaking_train.tsv", ("question", "answer", "explanation"))
    if file == "exams.yaml":
        rows = exam_rows(data / "exams" / "multilingual" / "train.jsonl.tar.gz")
        return [row for number, row in enumerate(rows) if number % 8 == 0 or row["answerKey"] == "@"]
    if file == "nusax.yaml":
        return table_rows(data / "nusax" / "sentiment" / "balinese" / "train.csv", ",")
    if file == "sib200.yaml":
        return table_rows(data / "sib200" / "tam_Taml" / "train.tsv", "\t")
    if file == "xquad.yaml":
        return list(squad_rows(data / "xquad" / "xquad.zh.json"))
    if file == "ntrex.yaml":
        return aligned_rows(data / "ntrex", "src.eng", "ref.yor", ("English", "Yoruba"))
    assert file == "xcopa.yaml", f"{file} is new: say here which rows it is for"
    return list(json_lines(data / "xcopa" / "data" / "sw" / "test.sw.jsonl"))


def rendered(file: str, rows: list[Row]) -> tuple[list[Template], list[PromptedRecord], RenderReport]:
    templates, report = load_templates(TEMPLATES / file), RenderReport()
    return templates, list(render_rows(rows, templates, seed=0, report=report)), report


@pytest.mark.parametrize("file", FILES)
def test_every_row_renders_under_every_template(file: str, shared_data: Path) -> None:
    rows = rows_for(file, shared_data)
    # Every count below comes from the rows; the one row without a right answer is found here, not in the report.
    unanswered = sum(
        "question" in row and isinstance(row["question"], dict) and row["answerKey"] not in "ABCDE" for row in rows
    )
    assert unanswered == (file == "exams.yaml")
    templates, records, report = rendered(file, rows)
    assert len(records) == (len(rows) - unanswered) * len(templates)
    for name, counts in report.templates.items():
        assert counts.no_target == unanswered and counts.blank == counts.no_input == counts.failed == 0, name
        assert not counts.undefined and not counts.target_not_in_choices and not counts.rejected, name
    assert {record.dataset for record in records} == {file.removesuffix(".yaml")}
    for record in records:
        assert record.task and (record.choices is None or record.choice_index is not None)
        assert "\n\n\n" not in record.inputs and not re.search("{{|}}|{%|<<|>>|####", record.inputs + record.targets)


@pytest.mark.parametrize("file", FILES)
def test_files_say_what_a_mixture_asks_for(file: str) -> None:
    templates = load_templates(TEMPLATES / file)
    assert sum(template.language == "en" and template.original_task is True for template in templates) >= 3
    for template in templates:
        assert template.name.endswith(f"_{template.language}"), "the name ends with the language of the prompt"
        assert template.choices_in_prompt is not None and template.original_task is not None, template.name
        assert template.metrics or not template.original_task, template.name
        assert bool(template.answer_choices) == (template.metrics == ("accuracy",)), template.name


def test_chains_of_thought_end_with_the_number(shared_data: Path) -> None:
    """The way is the row's own, less the calculator's marks: found here by a regular expression."""
    rows = rows_for("gsm8k.yaml", shared_data)
    posed, left_out = pose_templates(load_templates(TEMPLATES / "gsm8k.yaml"), [PLAIN, Variant(chain_of_thought=True)])
    assert len(left_out) == 3
    plan = RenderPlan(tuple(posed), seed=0)
    records = list(render_identified_rows(((str(number), row) for number, row in enumerate(rows)), plan))
    assert len(records) == 9 * len(rows)
    found = {(record.template, record.id): record for record in records}
    for number, row in enumerate(rows):
        way, value = re.sub("<<.*?>>", "", row["answer"]).split("\n#### ")
        value = value.replace(",", "")
        expected = {
            "question_answer_en": value,
            "solve_this_problem_en": value,
            "how_does_a_pupil_answer_en": value,
            "number_only_en": value,
            "explain_the_answer_en": way,
            "write_the_question_en": row["question"],
            "question_answer_en+cot": f"{way}\nThe answer is {value}.",
            "solve_this_problem_en+cot": f"{way}\n{value}",
            "how_does_a_pupil_answer_en+cot": f"{way}\nSo the answer is {value}.",
        }
        for template, targets in expected.items():
            record = found[template, str(number)]
            assert record.targets == targets and row["question"] in record.inputs + record.targets


def test_exam_answers_are_the_keys(shared_data: Path) -> None:
    rows = exam_rows(shared_data / "exams" / "multilingual" / "dev.jsonl.tar.gz")
    _, records, _ = rendered("exams.yaml", rows)
    sizes, ambiguous = Counter[int](), 0
    for row, start in zip(rows, range(0, len(records), 12), strict=True):
        texts = [choice["text"].strip() for choice in row["question"]["choices"]]
        right = [choice["label"] for choice in row["question"]["choices"]].index(row["answerKey"])
        ambiguous += len(set(texts)) < len(texts)
        sizes[len(texts)] += 1
        for record in records[start : start + 12]:
            assert record.choices == (list("ABCDE")[: len(texts)] if "letters" in record.template else texts)
            assert record.targets == record.choices[right]
            if record.template != "question_alone_en":
                assert all(text in record.inputs for text in texts)
    assert sizes == {4: 2375, 5: 174, 3: 123} and ambiguous == 3


WORD_FOR_WORD = [
    (
        "gsm8k.yaml",
        "explain_the_answer_en",
        0,
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        "did Natalia sell altogether in April and May?\nThe answer is 72. Explain why.",
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.",
        None,
    ),
    (
        "mgsm.yaml",
        "step_by_step_es",
        1,
        "Pregunta: Una bata lleva 2 rollos de tela azul y la mitad de esa cantidad de tela blanca. ¿Cuántos rollos se "
        "necesitan en total?\nRespuesta paso a paso:",
        "3",
        None,
    ),
    (
        "flan_cot.yaml",
        "explain_the_answer_en",
        0,
        "Of the following two sentences, which one is against common sense?\nOptions:\n"
        '- Sentence A: "He poured orange juice on his cereal."\n- Sentence B: "He poured milk on his cereal."\n\n'
        "The right answer is: Sentence A\nWhy?",
        "Orange juice does not taste good on cereal.",
        None,
    ),
    (
        "sib200.yaml",
        "choose_topic_sw",
        0,
        "துருக்கியின் மூன்று பக்கங்களும் கடல்களால் சூழப்பட்டுள்ளது: மேற்கில் ஏஜியன் கடல், வடக்கில் கருங்கடல் மற்றும் "
        "தெற்கில் மத்திய தரைக்கடல்.\n\n"
        "Maandishi haya yanahusu nini: sayansi/teknolojia, usafiri, siasa, michezo, afya, burudani au jiografia?",
        "jiografia",
        ["sayansi/teknolojia", "usafiri", "siasa", "michezo", "afya", "burudani", "jiografia"],
    ),
    (
        "nusax.yaml",
        "what_does_the_author_feel_en",
        0,
        'Someone wrote: "Nikmati cicilan 0% kanti 12 bulan antuk pemesanan tiket pesawat air asia nganggen kartu '
        'kredit bni!"\nDoes this person like it, dislike it, or neither?',
        "neither",
        ["like", "dislike", "neither"],
    ),
    (
        "ntrex.yaml",
        "languages_as_labels_en",
        0,
        "English: Welsh AMs worried about 'looking like muppets'\nYoruba:",
        "Àwọn ϙmϙ ẹgbé ile ìgbìmò Welsh n ṣaniyan nipa ‘wÍwò bii òmὺgò’",
        None,
    ),
    (
        "xcopa.yaml",
        "letters_en",
        0,
        "Sentence: Kifaa kilikuwa kimefungwa kwenye mfuko vibofu.\nWhich is the more likely cause?\n"
        "A) Kikuwa nyepesi kuvunjika.\nB) Kilikuwa kidogo.\nAnswer with A or B.",
        "A",
        ["A", "B"],
    ),
    (
        "exams.yaml",
        "subject_question_options_en",
        280,
        "This is a question of an examination in Biology. Choose the right answer.\n\nQuestion: A quale gruppo "
        "appartengono i denti del giudizio?\nOptions: canini; premolari; incisivi; molari\nAnswer:",
        "molari",
        ["canini", "premolari", "incisivi", "molari"],
    ),
    (
        "exams.yaml",
        "letters_it",
        280,
        "Domanda: A quale gruppo appartengono i denti del giudizio?\nA) canini\nB) premolari\nC) incisivi\nD) molari\n"
        "Risposta corretta:",
        "D",
        ["A", "B", "C", "D"],
    ),
    (
        "xquad.yaml",
        "context_question_answer_zh",
        48,
        "六次格莱美奖得主及奥斯卡奖提名者女神卡卡献唱了国歌，而奥斯卡奖得主玛丽·麦特琳担任了美国手语 (ASL) 翻译。\n\n"
        "问题：女神卡卡唱了什么歌？\n答案：",
        "国歌",
        None,
    ),
]


@pytest.mark.parametrize(
    ("file", "template", "row", "inputs", "targets", "choices"), WORD_FOR_WORD, ids=lambda value: str(value)[:16]
)
def test_word_for_word(
    file: str, template: str, row: int, inputs: str, targets: str, choices: list[str] | None, shared_data: Path
) -> None:
    _, records, _ = rendered(file, rows_for(file, shared_data)[row : row + 1])
    (record,) = [record for record in records if record.template == template]
    assert (record.inputs, record.targets, record.choices) == (inputs, targets, choices)
