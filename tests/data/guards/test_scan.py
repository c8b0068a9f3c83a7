"""The pass and its stored result: the same for any number of workers, keyed by what changes it, checked when opened."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards import EvaluationText, GuardSettings, guards_key, open_flags, scan
from megatron_xmtf.data.guards.examples import Corpus
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, DatasetError, DiskFullError, RankFailedError
from tests.data.guards import brute_force

scan_module = importlib.import_module("megatron_xmtf.data.guards.scan")
"""The module; the package's own `scan` is its function."""
EVERYTHING = GuardSettings(duplicates="drop", near_duplicates="report", contamination="drop")


def arguments(tokenizer: Tokenizer, directory: Path, **changed: object) -> dict:
    return {
        "tokenizer": tokenizer,
        "evaluation_texts": [EvaluationText("t", "sw", " ".join(f"w{n}" for n in range(20)), "a")],
        "settings": EVERYTHING,
        "directory": directory,
        "show_progress": False,
        **changed,
    }


def random_records(count: int, *, seed: int) -> list[dict]:
    """Return records of random words, of which some repeat, nearly repeat, or hold the evaluation text."""
    generator = np.random.default_rng(seed)
    records: list[dict] = []
    for number in range(count):
        inputs = " ".join(f"w{n}" for n in generator.integers(0, 1000, int(generator.integers(30, 60))))
        choice = generator.random()
        if records and choice < 0.1:
            inputs = records[int(generator.integers(len(records)))]["inputs"].upper()
        elif records and choice < 0.2:
            words = records[int(generator.integers(len(records)))]["inputs"].split()
            words[int(generator.integers(len(words)))] = "changed"
            inputs = " ".join(words)
        elif choice < 0.25:
            inputs = "so " + " ".join(f"w{n}" for n in range(20)) + f" it is {number}"
        language = ("sw", "th")[number % 2]
        records.append({"inputs": inputs, "targets": "yes", "language": language, "template": str(number % 3)})
    return records


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_same_bytes_for_any_number_of_workers_and_any_chunks(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [make_dataset(name, random_records(300, seed=seed)) for seed, name in enumerate("ab")]
    found = scan(datasets, **arguments(tokenizer, tmp_path / "one"))
    scan(datasets, workers=2, **arguments(tokenizer, tmp_path / "two"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    monkeypatch.setattr("megatron_xmtf.data.guards.examples.CHUNK_EXAMPLES", 7)
    monkeypatch.setattr("megatron_xmtf.data.guards.examples.CHUNK_TOKENS", 500)
    monkeypatch.setattr(scan_module, "PAIRS_PER_TASK", 3)
    scan(datasets, **arguments(tokenizer, tmp_path / "three"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert {name.split("/")[1] for name in files_of(tmp_path / "one")} == {
        "flags_00000.npy",
        "flags_00001.npy",
        "guards.json",
    }
    records = random_records(300, seed=0) + random_records(300, seed=1)
    flags = np.concatenate(found.flags)
    expected = brute_force.duplicates([(record["inputs"], record["targets"]) for record in records])
    assert ((flags & 1) != 0).tolist() == expected and sum(expected) > 30
    assert np.count_nonzero(flags & 2) > 10 and np.count_nonzero(flags & 8) > 15


def test_report_counts_what_the_flags_say(make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = random_records(200, seed=0)
    datasets = [make_dataset("a", records), make_dataset("b", random_records(50, seed=9))]
    found = scan(datasets, **arguments(tokenizer, tmp_path))
    assert json.loads(json.dumps(found.report)) == found.report
    row = found.report["datasets"][0]
    assert row["name"] == "a" and row["examples"] == 200
    bits = {
        "duplicates": 1,
        "near_duplicates": 2,
        "contaminated_exact": 4,
        "contaminated_ngram": 8,
        "contamination": 12,
    }
    languages = np.array([record["language"] for record in records])
    for name, bit in bits.items():
        flagged = (found.flags[0] & bit) != 0
        assert row[name] == flagged.sum()
        for language in ("sw", "th"):
            assert row["languages"][language][name] == (flagged & (languages == language)).sum()
            assert row["languages"][language]["examples"] == 100
    contaminated = {(row["dataset"], row["language"]): row["ngram"] for row in found.report["contamination"]}
    for language in ("sw", "th"):
        assert contaminated["a", language] == np.count_nonzero((found.flags[0] & 8 != 0) & (languages == language))
    for kind, bit in (("duplicate_pairs", 1), ("near_duplicate_pairs", 2)):
        for pair in found.report[kind]:
            number = "ab".index(pair["dataset"])
            assert found.flags[number][pair["example"]] & bit
            assert (pair["first_dataset"], pair["first_example"]) < (pair["dataset"], pair["example"])
    assert found.excluded(0).tolist() == (found.flags[0] != 0).tolist()
    assert found.excluded(0, EVERYTHING.dropped()).tolist() == ((found.flags[0] & 13) != 0).tolist()
    assert not found.excluded(0, ()).any()
    with pytest.raises(ConfigError, match="'duplicate' is no guard; nearest: duplicates"):
        found.excluded(0, ("duplicate",))


def test_first_copy_is_kept_across_datasets_and_only_among_selected(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one = make_dataset("one", [{"inputs": text, "targets": "x"} for text in ("a", "b", "a", "c")])
    two = make_dataset("two", [{"inputs": text, "targets": "x"} for text in ("B", "d", "a!")])
    found = scan([one, two], **arguments(tokenizer, tmp_path))
    assert [flags.tolist() for flags in found.flags] == [[0, 0, 1, 0], [1, 0, 1]]
    found = scan([two, one], **arguments(tokenizer, tmp_path))
    assert [flags.tolist() for flags in found.flags] == [[0, 0, 0], [1, 1, 1, 0]]
    selected = [np.array([False, False, True, True]), None]
    found = scan([one, two], selected=selected, **arguments(tokenizer, tmp_path))
    assert [flags.tolist() for flags in found.flags] == [[0, 0, 0, 0], [0, 0, 1]]
    assert found.report["datasets"][0]["examples"] == 2
    nothing = [np.zeros(4, np.bool_), np.zeros(3, np.bool_)]
    found = scan([one, two], selected=nothing, **arguments(tokenizer, tmp_path))
    assert not any(flags.any() for flags in found.flags)


def test_guards_that_are_off_flag_nothing(make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = make_dataset("d", random_records(150, seed=2))
    whole = scan([dataset], **arguments(tokenizer, tmp_path)).flags[0]
    for name, bits in {"duplicates": 1, "near_duplicates": 2, "contamination": 12}.items():
        settings = dataclasses.replace(EVERYTHING, **{name: "off"})
        found = scan([dataset], **arguments(tokenizer, tmp_path, settings=settings)).flags[0]
        assert found.tolist() == (whole & ~np.uint8(bits)).tolist() and (whole & bits).any()
    silent = GuardSettings(duplicates="off", contamination="off")
    assert not scan([dataset], **arguments(tokenizer, tmp_path, settings=silent)).flags[0].any()


def test_published_data_without_manifest_or_columns(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = make_dataset("d", random_records(150, seed=2))
    bare = tmp_path / "published" / "d"
    bare.parent.mkdir()
    for path in dataset.prefix.parent.glob("d_*_document.*"):
        shutil.copy(path, bare.parent)
    published = ExampleDataset.open(bare)
    assert published.manifest is None
    found = scan([published], **arguments(tokenizer, tmp_path / "out"))
    expected = scan([dataset], **arguments(tokenizer, tmp_path / "out"))
    assert ((found.flags[0] ^ expected.flags[0]) & 13 == 0).all()
    assert list(found.report["datasets"][0]["languages"]) == [""]
    assert found.key != expected.key
    targets = bare.parent / "d_targets_document.bin"
    content = bytearray(targets.read_bytes())
    content[0] ^= 1
    targets.write_bytes(content)
    assert guards_key_of(ExampleDataset.open(bare), tokenizer) != guards_key_of(dataset, tokenizer) != found.key
    assert guards_key_of(ExampleDataset.open(bare), tokenizer) != found.key


def guards_key_of(dataset: ExampleDataset, tokenizer: Tokenizer, **changed: object) -> str:
    keywords = arguments(tokenizer, Path(), **changed)
    del keywords["directory"], keywords["show_progress"]
    return guards_key([dataset], **keywords)[0]


def test_the_key_is_that_of_everything_that_changes_the_flags(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = make_dataset("d", random_records(20, seed=2))
    texts = [EvaluationText("t", "sw", "a", "b"), EvaluationText("t", "sw", "c", "d")]
    keys = [
        guards_key_of(dataset, tokenizer),
        guards_key_of(make_dataset("e", random_records(20, seed=3)), tokenizer),
        guards_key_of(dataset, dataclasses.replace(tokenizer, fingerprint="other")),
        guards_key_of(dataset, tokenizer, evaluation_texts=texts),
        guards_key_of(dataset, tokenizer, evaluation_texts=texts[::-1]),
        guards_key_of(dataset, tokenizer, evaluation_texts=[dataclasses.replace(t, template="u") for t in texts]),
        guards_key_of(dataset, tokenizer, selected=[np.arange(20) < 19]),
        *(
            guards_key_of(dataset, tokenizer, settings=dataclasses.replace(EVERYTHING, **change))
            for change in (
                {"ngram_words": 12},
                {"ngram_characters": 31},
                {"short_ngram_words": 7},
                {"short_ngram_characters": 17},
                {"minimum_overlap": 0.1},
                {"jaccard": 0.9},
                {"boilerplate": 0.3},
                {"near_duplicates": "off"},
            )
        ),
    ]
    assert len(set(keys)) == len(keys)
    moved = tmp_path / "moved"
    shutil.copytree(dataset.prefix.parent, moved)
    report_only = dataclasses.replace(EVERYTHING, duplicates="report")
    assert guards_key_of(ExampleDataset.open(moved / "d"), tokenizer, settings=report_only) == keys[0]


def test_stored_flags_are_opened_not_made_again(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("d", random_records(50, seed=2))
    keywords = arguments(tokenizer, tmp_path / "out")
    opening = {name: value for name, value in keywords.items() if name != "show_progress"}
    with pytest.raises(DatasetError, match="there are no guard flags"):
        open_flags([dataset], **opening)
    made = scan([dataset], **keywords)
    monkeypatch.setattr(scan_module._Scan, "flags_and_report", None)
    for again in (scan([dataset], **keywords), open_flags([dataset], **opening)):
        assert again.key == made.key and again.report == made.report and again.settings == EVERYTHING
        assert again.flags[0].tolist() == made.flags[0].tolist()
    report_only = dataclasses.replace(EVERYTHING, duplicates="report")
    assert scan([dataset], **{**keywords, "settings": report_only}).settings.dropped() == ("contamination",)


def test_damaged_flags_are_refused(make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = make_dataset("d", random_records(50, seed=2))
    keywords = arguments(tokenizer, tmp_path / "out")
    made = scan([dataset], **keywords)
    directory = tmp_path / "out" / made.key[:16]
    whole = files_of(directory)
    manifest = json.loads(whole["guards.json"])
    faults = {
        "was altered": ("flags_00000.npy", whole["flags_00000.npy"][:-1] + b"\x77"),
        "bytes instead of": ("flags_00000.npy", whole["flags_00000.npy"][:-1]),
        "is missing": ("flags_00000.npy", None),
        "does not exist": ("guards.json", None),
        "is not valid JSON": ("guards.json", whole["guards.json"][:-9]),
        "is not that of guard flags": ("guards.json", b"[]"),
        "their key is": ("guards.json", json.dumps(manifest | {"key": "0" * 64}).encode()),
        "have version 99": ("guards.json", json.dumps(manifest | {"version": 99}).encode()),
        "does not list 1 files": ("guards.json", json.dumps(manifest | {"files": {}}).encode()),
    }
    for message, (name, content) in faults.items():
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            scan([dataset], **keywords)
        (directory / name).write_bytes(whole[name])
    assert scan([dataset], **keywords).flags[0].tolist() == made.flags[0].tolist()


def test_nothing_is_left_of_a_failed_scan(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("d", random_records(50, seed=2))
    keywords = arguments(tokenizer, tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("megatron_xmtf.data.guards.flags.save_array", "os.posix_fallocate", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(DiskFullError):
                scan([dataset], **keywords)
        assert list((tmp_path / "out").iterdir()) == []
    for wrong in ({"jaccard": 0.0}, {"ngram_words": 7}, {"minimum_overlap": 1.5}, {"short_ngram_characters": 1}):
        with pytest.raises(ConfigError, match="guards: "):
            GuardSettings(**wrong)
    with pytest.raises(ConfigError, match="workers=0"):
        scan([dataset], workers=0, **keywords)


def test_another_process_that_was_first_is_left(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("d", random_records(50, seed=2))
    keywords = arguments(tokenizer, tmp_path / "out")
    made = scan([dataset], **arguments(tokenizer, tmp_path / "first"))
    chunks = Corpus.chunks

    def overtaken(corpus: Corpus) -> object:
        target = tmp_path / "out" / made.key[:16]
        if not target.exists():
            shutil.copytree(tmp_path / "first" / made.key[:16], target)
        return chunks(corpus)

    monkeypatch.setattr(Corpus, "chunks", overtaken)
    assert scan([dataset], **keywords).flags[0].tolist() == made.flags[0].tolist()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "first")


def test_a_killed_worker_ends_the_scan(
    make_dataset: Callable, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    dataset = make_dataset("d", random_records(300, seed=2))
    monkeypatch.setattr("megatron_xmtf.data.guards.examples.CHUNK_EXAMPLES", 5)
    monkeypatch.setattr(
        "megatron_xmtf.data.guards.report.ContaminationTally.add",
        lambda *_: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()],
    )
    with pytest.raises(RankFailedError, match="worker processes was killed"):
        scan([dataset], workers=2, **arguments(tokenizer, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
