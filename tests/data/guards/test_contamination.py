"""Evaluation texts planted in real training data are all found, honest splits are clean, templates are no content."""

import csv
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards import EvaluationText, GuardFlags, GuardSettings, scan
from megatron_xmtf.data.guards.settings import CONTAMINATED_EXACT, CONTAMINATED_NGRAM
from megatron_xmtf.data.tokenizer import Tokenizer
from tests.data.guards import brute_force

TOPICS = "science/technology, travel, politics, sports, health, entertainment, geography"
TOPIC_TEMPLATES = {
    "options": f"What is the topic of the following text? {{}}\nThe possible topics are: {TOPICS}",
    "which": f"Text: {{}}\nWhich of these is it about, {TOPICS}?\nAnswer:",
}
SETTINGS = GuardSettings(duplicates="off", contamination="drop")


def run(
    datasets: list[ExampleDataset],
    texts: list[EvaluationText],
    tokenizer: Tokenizer,
    directory: Path,
    settings: GuardSettings = SETTINGS,
) -> GuardFlags:
    return scan(
        datasets,
        tokenizer=tokenizer,
        evaluation_texts=texts,
        settings=settings,
        directory=directory,
        show_progress=False,
    )


def sib200(root: Path, language: str, split: str) -> list[dict]:
    with open(root / "sib200" / language / f"{split}.tsv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def topic_questions(root: Path, language: str) -> list[EvaluationText]:
    return [
        EvaluationText("sib200", language, wording.format(row["text"]), row["category"], name)
        for row in sib200(root, language, "test")
        for name, wording in TOPIC_TEMPLATES.items()
    ]


def mgsm_questions(root: Path, language: str) -> list[EvaluationText]:
    lines = (root / "mgsm" / f"mgsm_{language}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [EvaluationText("mgsm", language, f"Question: {row[0]}\nAnswer:", row[1], "q") for row in rows]


def xcopa_questions(root: Path, language: str) -> list[EvaluationText]:
    texts = []
    path = root / "xcopa" / "data" / language / f"val.{language}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        inputs = (
            f"Here is what happened: {row['premise']}\nWhat was the {row['question']}? Choose the likelier one:\n"
            f"- {row['choice1']}\n- {row['choice2']}"
        )
        texts.append(EvaluationText("xcopa", language, inputs, row[f"choice{row['label'] + 1}"], "plausible"))
    return texts


def topic_records(root: Path, language: str, *, count: int | None = None) -> list[dict]:
    return [
        {
            "inputs": wording.format(row["text"]),
            "targets": row["category"],
            "language": language,
            "dataset": "sib200",
            "template": name,
        }
        for row in sib200(root, language, "train")[:count]
        for name, wording in TOPIC_TEMPLATES.items()
    ]


def verbatim(text: EvaluationText, number: int) -> tuple[str, str]:
    return text.inputs, text.targets


def retouched(text: EvaluationText, number: int) -> tuple[str, str]:
    """Case, punctuation, spacing and composition changed."""
    inputs = unicodedata.normalize("NFD", text.inputs.upper().replace(",", " ,").replace(".", "!").replace(" ", "  "))
    return f"«{inputs}»", text.targets.title() + "."


def embedded(text: EvaluationText, number: int) -> tuple[str, str]:
    return f"Page {number} of the archive begins here. {text.inputs} And so it goes on, number {number}.", "archived"


def in_the_target(text: EvaluationText, number: int) -> tuple[str, str]:
    return f"Invent exercise {number}.", f"Here is one. {text.inputs} {text.targets}"


PLANTS: dict[str, Callable[[EvaluationText, int], tuple[str, str]]] = {
    "verbatim": verbatim,
    "retouched": retouched,
    "embedded": embedded,
    "in_the_target": in_the_target,
}


@pytest.mark.parametrize("language", ["th", "zh", "tr", "ta", "ht"])
def test_planted_xcopa_is_found(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path, language: str
) -> None:
    texts = xcopa_questions(shared_data, language)
    assert len(texts) == 100
    clean = topic_records(shared_data, "zho_Hans" if language == "zh" else "eng_Latn", count=100)
    check_planted(make_dataset, tokenizer, tmp_path, texts, clean, language)


@pytest.mark.parametrize("language", ["en", "sw", "zh"])
def test_planted_mgsm_is_found(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path, language: str
) -> None:
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    clean = [
        {"inputs": f"Question: {row['question']}\nAnswer:", "targets": row["answer"]} for row in map(json.loads, lines)
    ]
    check_planted(make_dataset, tokenizer, tmp_path, mgsm_questions(shared_data, language)[:100], clean, language)


@pytest.mark.parametrize("language", ["eng_Latn", "jpn_Jpan", "zho_Hans", "arb_Arab"])
def test_planted_sib200_is_found(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path, language: str
) -> None:
    texts = topic_questions(shared_data, language)[:200]
    check_planted(make_dataset, tokenizer, tmp_path, texts, topic_records(shared_data, language, count=150), language)


def check_planted(
    make_dataset: Callable,
    tokenizer: Tokenizer,
    directory: Path,
    texts: list[EvaluationText],
    clean: list[dict],
    language: str,
) -> None:
    """Plant every evaluation text in every way among clean records: all are found, and nothing else is."""
    plain = {"dataset": "plain", "template": "t", "language": language}
    records = [plain | record for record in clean]
    for name, plant in PLANTS.items():
        for number, text in enumerate(texts):
            inputs, targets = plant(text, number)
            row = {"inputs": inputs, "targets": targets, "language": language, "dataset": name, "template": name}
            records.append(row)
    found = run([make_dataset("train", records)], texts, tokenizer, directory / "out")
    flags = found.flags[0]
    start = len(clean)
    assert not flags[:start].any(), [records[at] for at in np.flatnonzero(flags[:start])]
    for name in PLANTS:
        planted = flags[start : start + len(texts)]
        missed = np.flatnonzero(planted == 0)
        assert not len(missed), f"{name}: {len(missed)} missed, such as {records[start + missed[0]]}"
        if name in ("verbatim", "retouched"):
            assert (planted & CONTAMINATED_EXACT).all(), name
        else:
            assert (planted & CONTAMINATED_NGRAM).all(), name
        start += len(texts)
    (task,) = found.report["tasks"]
    assert task["found"] == task["evaluation_texts"] == len(texts)
    assert found.excluded(0, SETTINGS.dropped()).sum() == len(PLANTS) * len(texts)


def test_content_is_found_under_another_template(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path
) -> None:
    """The bare text, without the wording it is evaluated in: found where it has 8 words, or 18 letters."""
    for language, unspaced in (("eng_Latn", False), ("jpn_Jpan", True)):
        rows = sib200(shared_data, language, "test")
        records = [{"inputs": f"Continue number {n}: {row['text']}", "targets": "...no."} for n, row in enumerate(rows)]
        dataset = make_dataset(language, records)
        found = run([dataset], topic_questions(shared_data, language), tokenizer, tmp_path / "out")
        sizes = [len(brute_force.units(row["text"])) for row in rows]
        long_enough = np.array(sizes) >= (18 if unspaced else 8)
        assert long_enough.mean() > 0.9
        assert (found.flags[0][long_enough] == CONTAMINATED_NGRAM).all()


def test_honest_splits_are_clean(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path
) -> None:
    """SIB-200 train holds one sentence that is a part of a test text, found here in English and in Swahili."""
    languages = ["eng_Latn", "swh_Latn", "zho_Hans", "tam_Taml", "kor_Hang"]
    dataset = make_dataset("sib", [row for language in languages for row in topic_records(shared_data, language)])
    texts = [text for language in languages for text in topic_questions(shared_data, language)]
    found = run([dataset], texts, tokenizer, tmp_path / "out")
    assert found.report["datasets"][0]["contaminated_exact"] == 0
    flagged = np.flatnonzero(found.flags[0])
    assert len(flagged) == 4  # the sentence under two templates, in two languages
    wording = {match["ngram"] for match in found.report["matches"]}
    assert "he was staying in the team hotel ahead of a match planned for sunday against bolonia" in wording
    counts = {row["language"]: row["examples"] for row in found.report["contamination"]}
    assert counts == {"eng_Latn": 2, "swh_Latn": 2}


def test_gsm8k_train_holds_no_mgsm(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path
) -> None:
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [
        {"inputs": f"Question: {row['question']}\nAnswer:", "targets": row["answer"]} for row in map(json.loads, lines)
    ]
    texts = [text for language in ("en", "es", "fr", "sw", "zh") for text in mgsm_questions(shared_data, language)]
    found = run([make_dataset("gsm8k", records)], texts, tokenizer, tmp_path / "out")
    assert not found.flags[0].any(), found.report["matches"]
    assert sum(task["untestable"] for task in found.report["tasks"]) == 0


def random_text(generator: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in generator.integers(0, 10**6, count))


def wrap(content: str, branch: int = 0) -> str:
    options = "Please answer with one of the following five words and nothing else at all: red green blue black white"
    ask = ("Is this statement true in the light of everything that is known to you", "Would a careful reader doubt it")
    return f"Read the statement below very carefully before you decide anything. {content} {ask[branch]}? {options}"


def test_a_shared_template_is_no_contamination(make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Train and evaluation stand in one long template with two branches; the contents differ, however short."""
    generator = np.random.default_rng(0)
    starts = ["A man", "The", "A woman", "Two"]  # contents that begin alike must not lengthen the template

    def contents(count: int) -> list[str]:
        return [f"{starts[n % 4]} {random_text(generator, int(generator.integers(1, 9)))}" for n in range(count)]

    records = [
        {"inputs": wrap(content, n % 2), "targets": "red", "template": "t"} for n, content in enumerate(contents(200))
    ]
    with_columns, without = (
        make_dataset("with", records),
        make_dataset(
            "without", [{"inputs": wrap(content, n % 2), "targets": "red"} for n, content in enumerate(contents(200))]
        ),
    )
    for count in (80, 20):  # judged by itself, and only together with the training template
        questions = [
            EvaluationText("t", "en", wrap(content, n % 2), "red", "t") for n, content in enumerate(contents(count))
        ]
        found = run([with_columns, without], questions, tokenizer, tmp_path / f"out{count}")
        assert not any(flags.any() for flags in found.flags), found.report["matches"]
        assert found.report["tasks"][0]["template_wording_fraction"] > 0.75
    control = [
        EvaluationText("t", "en", wrap("The w1"), "red", "t"),
        EvaluationText("t", "en", wrap("A w2"), "red", "t"),
    ]
    found = run([with_columns], control, tokenizer, tmp_path / "control")
    assert found.flags[0].any(), "two texts show no template: then it is taken for content"


def test_questions_on_one_passage_are_not_taken_for_a_template(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """20 questions on one passage share it as a template is shared; training data that quote it are contaminated."""
    generator = np.random.default_rng(0)
    passage = random_text(generator, 120)
    questions = [
        EvaluationText("qa", "en", f"{passage} Question: {random_text(generator, 6)}?", "x", "t") for _ in range(20)
    ]
    records = [{"inputs": f"Question: {random_text(generator, 30)}?", "targets": "y"} for _ in range(100)]
    records.append({"inputs": f"Summarise. {passage}", "targets": "z"})
    found = run([make_dataset("train", records)], questions, tokenizer, tmp_path / "out")
    assert np.flatnonzero(found.flags[0]).tolist() == [100]
    (match, *_) = found.report["matches"]
    assert len(match["ngram"]) == 400 and passage.startswith(match["ngram"].removesuffix(" ..."))


def test_flags_are_those_of_the_oracle(make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Random contents of all lengths in templates, pieces of evaluation texts cut into the training data."""
    generator = np.random.default_rng(5)

    def content(length: int) -> str:
        if generator.random() < 0.3:
            return "".join(chr(c) for c in generator.integers(0x4E00, 0x9000, 2 * length))
        if generator.random() < 0.3:
            return "".join(chr(c) for c in generator.integers(0x3042, 0x3090, 2 * length))
        return random_text(generator, length)

    evaluation = []
    for group, size in (("a", 60), ("b", 20), ("c", 2)):
        for _ in range(size):
            inputs = content(int(generator.integers(1, 40)))
            inputs = wrap(inputs) if generator.random() < 0.7 else inputs
            targets = content(int(generator.integers(1, 25)))
            evaluation.append(EvaluationText(group, "xx", inputs, targets, "t"))
    records, groups = [], []
    for number in range(300):
        inputs, targets = content(int(generator.integers(1, 30))), content(int(generator.integers(1, 8)))
        if generator.random() < 0.6:
            chosen = evaluation[int(generator.integers(len(evaluation)))]
            text = chosen.inputs if generator.random() < 0.7 else chosen.targets
            words = text.split(" ")
            low = int(generator.integers(len(words)))
            piece = " ".join(words[low : low + int(generator.integers(1, 40))])
            inputs = f"{inputs} {piece}" if generator.random() < 0.5 else piece
            if generator.random() < 0.15:
                inputs, targets = chosen.inputs.upper(), chosen.targets if generator.random() < 0.5 else targets
        inputs = wrap(inputs) if number % 2 else inputs
        records.append({"inputs": inputs, "targets": targets, "template": str(number % 2)})
        groups.append(number % 2)
    found = run([make_dataset("train", records)], evaluation, tokenizer, tmp_path / "out").flags[0]
    examples = [(record["inputs"], record["targets"]) for record in records]
    expected = brute_force.contamination(examples, evaluation, train_groups=groups)
    assert [((f & CONTAMINATED_EXACT) != 0, (f & CONTAMINATED_NGRAM) != 0) for f in found.tolist()] == expected
    assert 5 < sum(exact for exact, _ in expected) < 250 and 20 < sum(ngram for _, ngram in expected) < 250


def test_the_least_overlap_and_the_overlap_reported(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    words = random_text(generator, 112).split()  # 100 n-grams
    text = EvaluationText("t", "en", " ".join(words), "a")
    records = [{"inputs": " ".join(words[:count]), "targets": f"b{count}"} for count in (12, 13, 37, 62, 112)]
    dataset = make_dataset("train", records)
    for least, expected in ((0.0, [1, 2, 3, 4]), (0.25, [2, 3, 4]), (0.5, [3, 4]), (1.0, [4])):
        settings = GuardSettings(minimum_overlap=least)
        found = run([dataset], [text], tokenizer, tmp_path / f"out{least}", settings)
        assert np.flatnonzero(found.flags[0]).tolist() == expected
        shares = {match["example"]: match["overlap_fraction"] for match in found.report["matches"]}
        assert all(shares[at] == {1: 0.01, 2: 0.25, 3: 0.5, 4: 1.0}[at] for at in shares)


def test_texts_too_short_are_counted_and_found_exactly(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [EvaluationText("capitals", "en", "What is the capital of Chad?", "N'Djamena")]
    records = [
        {"inputs": "what is the capital of CHAD", "targets": "?"},
        {"inputs": "Tell me, what is the capital of Chad?", "targets": "N'Djamena"},
    ]
    found = run([make_dataset("train", records)], texts, tokenizer, tmp_path / "out")
    assert found.flags[0].tolist() == [CONTAMINATED_EXACT, 0]
    assert found.report["tasks"][0]["untestable"] == 1


def test_text_datasets_hold_inputs_and_answers_together(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [EvaluationText("capitals", "en", "What is the capital of Chad?", "N'Djamena")]
    records = [{"text": "What is the capital of Chad? N'Djamena."}, {"text": "What is the capital of Mali? Bamako."}]
    found = run([make_dataset("plain", records, kind="text")], texts, tokenizer, tmp_path / "out")
    assert found.flags[0].tolist() == [CONTAMINATED_EXACT, 0]


def test_a_text_torn_over_two_examples_is_not_found(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    words = [f"w{number}" for number in range(30)]
    texts = [
        EvaluationText("short", "en", " ".join(words[:10]), "a"),
        EvaluationText("long", "en", " ".join(words), "a"),
    ]
    records = [
        {"inputs": " ".join(words[:7]), "targets": words[7]},
        {"inputs": " ".join(words[8:14]), "targets": " ".join(words[14:20])},
        {"inputs": " ".join(words[20:]), "targets": "end"},
        {"inputs": " ".join(words[:7]), "targets": " ".join(words[7:10])},
        {"inputs": " ".join(words[20:26]), "targets": " ".join(words[26:])},
    ]
    found = run([make_dataset("train", records)], texts, tokenizer, tmp_path / "out")
    assert found.flags[0].tolist() == [0, 0, 0, CONTAMINATED_EXACT | CONTAMINATED_NGRAM, 0]
