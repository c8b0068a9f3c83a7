"""Near duplicates: what is one, what is not, against the plain Python oracle, and on real rows under a template."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards import GuardSettings, scan
from megatron_xmtf.data.guards.near_duplicates import MOST_COMPARISONS, find_near_duplicates
from megatron_xmtf.data.guards.settings import DUPLICATE, NEAR_DUPLICATE
from megatron_xmtf.data.tokenizer import Tokenizer
from tests.data.guards import brute_force

PASSAGE = " ".join(f"word{number}" for number in range(150))
SETTINGS = GuardSettings(near_duplicates="drop", contamination="off")


def flags_of(dataset: ExampleDataset, tokenizer: Tokenizer, directory: Path, **keywords: object) -> np.ndarray:
    found = scan(
        [dataset],
        tokenizer=tokenizer,
        evaluation_texts=[],
        settings=SETTINGS,
        directory=directory,
        show_progress=False,
        **keywords,
    )
    return found.flags[0]


def random_words(generator: np.random.Generator, count: int) -> list[str]:
    return [f"w{number}" for number in generator.integers(0, 10**6, count)]


def record(inputs: str, targets: str, template: str = "t", dataset: str = "d") -> dict:
    return {"inputs": inputs, "targets": targets, "template": template, "dataset": dataset}


def test_a_retouch_is_one_and_other_questions_on_a_passage_are_not(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    retouched = PASSAGE.replace("word77", "other77")
    rows = [
        (record(f"{PASSAGE} Who won?", "Ali"), 0),
        (record(f"{retouched} Who won?", "Ali"), NEAR_DUPLICATE),
        (record(f"{retouched} Who won?", "Bo"), 0),  # other target
        (record(f"{PASSAGE} Did he ever see his only son again?", "Ali"), 0),  # other question, same answer
        (record(f"{PASSAGE} who WON", "ali."), DUPLICATE),
        (record(f"{retouched} Who is it?", "Ali", template="u"), 0),  # another template, another example
        (record(f"{retouched} Who was it?", "Ali", dataset="e"), 0),
        (record("short text", "Ali"), 0),
        (record("short texts", "Ali"), 0),
    ]
    generator = np.random.default_rng(0)
    rows += [(record(" ".join(random_words(generator, 9)), "Ali"), 0) for _ in range(20)]  # too many for a template
    rows += [
        (record(" ".join(random_words(generator, 9)), "x", template=t, dataset=d), 0)
        for t, d in (("u", "d"), ("t", "e"))
        for _ in range(5)
    ]
    dataset = make_dataset("d", [row for row, _ in rows])
    assert flags_of(dataset, tokenizer, tmp_path / "out").tolist() == [flag for _, flag in rows]


def test_rows_of_one_template_are_not_near_duplicates(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A template of 60 words around contents of 4: nearly everything is shared, and the targets are equal."""
    before, after = " ".join(f"before{n}" for n in range(30)), " ".join(f"after{n}" for n in range(30))
    generator = np.random.default_rng(0)
    rows = [record(f"{before} {' '.join(random_words(generator, 4))} {after}", "yes") for _ in range(60)]
    dataset = make_dataset("d", rows)
    assert not flags_of(dataset, tokenizer, tmp_path / "out").any()
    texts = [(row["inputs"], row["targets"]) for row in rows]
    bare = {wording for _, _, wording in brute_force.shingles(texts[0][0])}
    other = {wording for _, _, wording in brute_force.shingles(texts[1][0])}
    assert brute_force.jaccard(bare, other) > 0.8, "the control: without its wording taken out they would be"


@pytest.mark.parametrize("count", [2, 5, 8, 25])
def test_rows_of_a_rare_template_are_left_alone(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, count: int
) -> None:
    """A long instruction and one word, equal targets; without the template's name it may be a retouch."""
    instruction = " ".join(f"instruction{n}" for n in range(40))
    rows = [record(f"{instruction} word{number}", "artifact") for number in range(count)]
    assert not flags_of(make_dataset("with", rows), tokenizer, tmp_path / "out").any()
    nameless = [{"inputs": row["inputs"], "targets": row["targets"]} for row in rows]
    flagged = flags_of(make_dataset("without", nameless), tokenizer, tmp_path / "out")
    assert np.count_nonzero(flagged == NEAR_DUPLICATE) == (1 if count == 2 else 0)


def test_data_without_templates_are_warned_of(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags_of(make_dataset("with", [record("a", "b")]), tokenizer, tmp_path / "out")
    assert not caplog.messages
    flags_of(make_dataset("without", [{"inputs": "a", "targets": "b"}]), tokenizer, tmp_path / "out")
    assert "does not say which template" in caplog.text


def test_real_rows_of_one_template_are_not_near_duplicates(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, shared_data: Path
) -> None:
    rows = []
    for language in ("eng_Latn", "zho_Hans", "jpn_Jpan", "arb_Arab"):
        with open(shared_data / "sib200" / language / "train.tsv", encoding="utf-8", newline="") as stream:
            for row in list(csv.DictReader(stream, delimiter="\t"))[:150]:
                for name, wording in (("a", "{} What is this text about?"), ("b", "Name the topic of: {}")):
                    rows.append(record(wording.format(row["text"]), row["category"], template=name))
    assert not flags_of(make_dataset("d", rows), tokenizer, tmp_path / "out").any()


def test_flags_are_those_of_the_oracle(make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Random texts, each followed by versions with more and more words changed, in two groups and two scripts."""
    generator = np.random.default_rng(3)
    rows = []
    for number in range(50):
        is_chinese = number % 5 == 0
        count = int(generator.integers(10, 60))
        text = (
            [chr(c) for c in generator.integers(0x4E00, 0x9000, count)]
            if is_chinese
            else random_words(generator, count)
        )
        for changes in (0, 1, 2, 4, 8):
            version = list(text)
            for at in generator.integers(0, count, changes):
                version[at] = "变" if is_chinese else f"changed{number}"
            inputs = "Read this carefully please: " + ("" if is_chinese else " ").join(version)
            rows.append(record(inputs, "yes" if number % 3 else "a longer answer", template=str(number % 2)))
    generator.shuffle(rows)
    flags = flags_of(make_dataset("d", rows), tokenizer, tmp_path / "out")
    examples = [(row["inputs"], row["targets"]) for row in rows]
    expected = brute_force.near_duplicates(examples, [row["template"] for row in rows])
    assert ((flags & DUPLICATE) != 0).tolist() == brute_force.duplicates(examples)
    found = (flags & NEAR_DUPLICATE) != 0
    assert not (found & ~np.array(expected)).any(), "a flag that is no near duplicate"
    assert sum(expected) > 30 and found.sum() >= 0.97 * sum(expected)


def test_the_first_is_kept_whatever_the_order_of_bands() -> None:
    """Positions 1-5 are near duplicates of 0 or of each other, found in different bands."""
    edges = {(1, 0), (2, 1), (5, 2), (4, 3)}
    bands = np.array([[1, 1, 0, 2, 2, 0], [0, 3, 3, 0, 0, 0], [9, 0, 4, 9, 0, 4]], np.uint32)

    def verify(pairs: np.ndarray) -> np.ndarray:
        return np.array([tuple(pair) in edges for pair in pairs.tolist()])

    nothing = np.zeros(6, np.bool_)
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        flags, pairs, left_out = find_near_duplicates(bands[order], nothing, verify=verify)
        assert flags.tolist() == [False, True, True, False, True, True]
        assert {tuple(pair) for pair in pairs} == edges and left_out == 0
    one_bucket, second = np.full((1, 3), 5, np.uint32), {(2, 1)}
    found = find_near_duplicates(
        one_bucket, nothing[:3], verify=lambda pairs: np.array([tuple(pair) in second for pair in pairs.tolist()])
    )
    assert found[0].tolist() == [False, False, True], "compared with the first of its bucket only"
    skipped = np.array([False, True, False, False, False, False])
    assert find_near_duplicates(bands, skipped, verify=verify)[0].tolist() == [False, False, False, False, True, True]


def test_comparisons_left_out_are_counted() -> None:
    count = MOST_COMPARISONS + 4
    asked: list[int] = []

    def verify(pairs: np.ndarray) -> np.ndarray:
        asked.append(len(pairs))
        return np.zeros(len(pairs), np.bool_)

    flags, _, left_out = find_near_duplicates(np.ones((1, count), np.uint32), np.zeros(count, np.bool_), verify=verify)
    assert not flags.any()
    assert sum(asked) + left_out == count * (count - 1) // 2
    assert left_out == 3 + 2 + 1


@pytest.mark.parametrize("threshold", [0.6, 0.95])
def test_the_threshold_is_the_settings(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, threshold: float
) -> None:
    words = [f"word{number}" for number in range(40)]
    changed = [*words[:10], "x", *words[11:25], "y", *words[26:]]  # Jaccard 36 / 48 = 0.75
    dataset = make_dataset("d", [{"inputs": " ".join(text), "targets": "a"} for text in (words, changed)])
    settings = GuardSettings(near_duplicates="report", contamination="off", jaccard=threshold)
    found = scan(
        [dataset],
        tokenizer=tokenizer,
        evaluation_texts=[],
        settings=settings,
        directory=tmp_path / "out",
        show_progress=False,
    )
    assert found.flags[0].tolist() == [0, NEAR_DUPLICATE if threshold < 0.75 else 0]
    if threshold < 0.75:
        (pair,) = found.report["near_duplicate_pairs"]
        assert (pair["example"], pair["first_example"]) == (1, 0)
        assert pair["text"].startswith("word0") and pair["first_text"].endswith("-> a")
