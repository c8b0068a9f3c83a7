"""Render jobs: what they refuse, what they write, how they go on after being stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.cli import main

ENGLISH = """
task: topic
templates:
- {name: ask it, language: en, input: "{{ text }} Topic?", target: "{{ topic }}", answer_choices: [a, b]}
- {name: name/it, input: "{{ text }}", target: "{{ topic }}", rationale: "{{ why }}"}
- {name: ask_etmt, language: et, translation: machine, input: "{{ text }} Teema?", target: "{{ topic }}"}
- {name: ask_etht, language: et, translation: human, input: "{{ text }} Mis teema?", target: "{{ topic }}"}
"""


def rows(language: str, count: int) -> list[dict[str, Any]]:
    return [{"id": n, "text": f"{language} größe {n}", "topic": "ab"[n % 2], "why": f"w{n}"} for n in range(count)]


def write_rows(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "T.yaml").write_text(ENGLISH, encoding="utf-8")
    for language in ("et", "sw"):
        write_rows(tmp_path / f"train.{language}.jsonl", rows(language, 30))
    return tmp_path


def entry(**values: Any) -> dict[str, Any]:
    base = {"dataset": "top/ics", "split": "train", "languages": ["et"], "source": "train.{language}.jsonl"}
    merged = {**base, "templates": "T.yaml", "config": "{language}", **values}
    return {key: value for key, value in merged.items() if value is not None}


def render(directory: Path, *entries: dict[str, Any], arguments: tuple[str, ...] = (), **job: Any) -> int:
    values = {"name": "xp3", "seed": 7, "output_directory": "out", "entries": list(entries), **job}
    (directory / "job.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return main(["render", "--job", str(directory / "job.yaml"), *arguments])


def files(directory: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for path in sorted((directory / "out").rglob("*.jsonl")):
        found[str(path.relative_to(directory / "out"))] = [
            json.loads(line) for line in path.read_text("utf-8").splitlines()
        ]
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """Every byte of an output directory but for the marks of what is finished."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".render" not in path.parts
    }


def test_names_metadata_and_summary(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(directory, entry(task="topics", exclude=["*_et?t"])) == 0
    found = files(directory)
    assert list(found) == ["et/xp3_top_ics_et_train_ask_it.jsonl", "et/xp3_top_ics_et_train_name_it.jsonl"]
    assert found["et/xp3_top_ics_et_train_ask_it.jsonl"][3] == {
        "inputs": "et größe 3 Topic?",
        "targets": "b",
        "id": "3",
        "dataset": "top/ics",
        "config": "et",
        "split": "train",
        "language": "et",
        "template": "ask it",
        "template_language": "en",
        "task": "topics",
        "choices": ["a", "b"],
    }
    summary = json.loads((directory / "out" / "summary.json").read_text())
    assert (summary["files"], summary["records"], summary["parts"][0]["rows"]) == (2, 60, 30)
    for template in summary["parts"][0]["templates"]:
        data = (directory / "out" / template["file"]).read_bytes()
        assert template["bytes"] == len(data) and template["sha256"] == hashlib.sha256(data).hexdigest()
    assert "60 records in 2 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"ask it", "name/it"}),
        ({"prompts": "localised"}, {"ask_etmt", "ask_etht"}),
        ({"prompts": "localised", "translation": "human"}, {"ask_etht"}),
        ({"prompts": "both", "translation": "machine"}, {"ask it", "name/it", "ask_etmt"}),
        ({"prompts": "both", "exclude": ["name*"]}, {"ask it", "ask_etmt", "ask_etht"}),
        ({"languages": {"ekk_Latn": "et"}, "source": "train.{prompt_language}.jsonl", "prompts": "localised"}, None),
        ({"languages": ["ekk_Latn"], "source": "train.{prompt_language}.jsonl", "prompts": "localised"}, None),
        ({"languages": ["sw"], "prompts": "localised", "missing": "english"}, {"ask it", "name/it"}),
        ({"languages": ["sw"], "prompts": "localised", "missing": "skip"}, set()),
        ({"languages": ["sw"], "prompts": "both", "missing": "skip"}, {"ask it", "name/it"}),
    ],
)
def test_prompts_by_language(directory: Path, options: dict[str, Any], names: set[str] | None) -> None:
    assert render(directory, entry(**options)) == 0
    found = {record["template"] for records in files(directory).values() for record in records}
    assert found == (names if names is not None else {"ask_etmt", "ask_etht"})
    (part,) = json.loads((directory / "out" / "summary.json").read_text())["parts"]
    assert part["missing_localised"] is (part["language"] == "sw")


def test_english_and_localised_files(directory: Path) -> None:
    english, estonian = directory / "en.yaml", directory / "et.yaml"
    english.write_text("templates: [{name: e, input: '{{ text }}', target: '{{ topic }}'}]", encoding="utf-8")
    estonian.write_text("language: et\ntemplates: [{name: l, input: '{{ text }}', target: x}]", encoding="utf-8")
    templates = {"english": "en.yaml", "localised": "{prompt_language}.yaml"}
    assert render(directory, entry(templates=templates, prompts="both")) == 0
    assert {record["template"] for records in files(directory).values() for record in records} == {"e", "l"}


def test_one_file_of_many_languages(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [{**row, "id": None, "lang": name} for row in rows("x", 10) for name in ("Estonian", "Swahili")]
    write_rows(directory / "data_all.jsonl", [{k: v for k, v in row.items() if k != "id"} for row in mixed])
    languages = {
        "ekk_Latn": {"prompt": "et", "path": "all", "name": "Estonian"},
        "swh_Latn": {"path": "all", "name": "Swahili"},
    }
    source = {"path": "data_{path}.jsonl", "where": {"lang": "{name}"}, "constants": {"told": "{language}"}}
    options = {"config": "{path}", "prompts": "localised", "missing": "english", "exclude": ["name*", "*ht"]}
    assert render(directory, entry(languages=languages, source=source, **options)) == 0
    found = files(directory)
    names = ["ekk_Latn/xp3_top_ics_all_train_ask_etmt.jsonl", "swh_Latn/xp3_top_ics_all_train_ask_it.jsonl"]
    assert list(found) == names
    ids = [record["id"] for records in found.values() for record in records]
    assert len(ids) == len(set(ids)) == 20, "rows of one file have ids of their own, whatever filter takes them"
    summary = json.loads((directory / "out" / "summary.json").read_text())
    assert [(part["rows"], part["left_out_rows"]) for part in summary["parts"]] == [(10, 10), (10, 10)]
    printed = capsys.readouterr().out
    assert "no template is worded in 'sw'; English ones are taken" in printed
    assert "10 rows have other values than `where` asks for" in printed


def test_rows_that_are_no_variables_are_skipped_and_counted(directory: Path) -> None:
    with open(directory / "train.et.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"text": "t", "topic": "a", "answer_choices": []}\n{"a-b": 1, "a_b": 2}\n')
    assert render(directory, entry()) == 2
    assert render(directory, entry(), arguments=("--skip-errors",)) == 0
    (part,) = json.loads((directory / "out" / "summary.json").read_text())["parts"]
    assert part["rows"] == 30
    assert part["rejected_rows"] == {"a field `answer_choices`": 1, "two fields of one name": 1}


def test_exemplars_come_from_the_declared_training_rows(directory: Path) -> None:
    write_rows(directory / "shots.jsonl", [{"id": f"s{n}", "text": f"SHOT {n}", "topic": "b"} for n in range(9)])
    exemplars = {"source": "shots.jsonl", "split": "train_r1"}
    delimiters = [{"input": "<", "target": "|", "separator": ">"}]
    options = {"variants": ["plain", "2shot"], "include": ["ask it"], "delimiters": delimiters}
    assert render(directory, entry(split="validation", exemplars=exemplars, **options)) == 0
    records = files(directory)["et/xp3_top_ics_et_validation_ask_it+2shot.jsonl"]
    assert len(records) == 30
    for record in records:
        *shown, question = record["inputs"].split("<")[1:]
        assert len(shown) == 2 and all(text.startswith("SHOT") and text.endswith("|b>") for text in shown)
        assert question.startswith("et größe") and record["template"] == "ask it+2shot"


def cap_key(seed: str, row_id: str, template: str) -> int:
    """What a cap ranks by, by plain whole numbers."""

    def number(*parts: str) -> int:
        return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")

    mask = (1 << 64) - 1
    value = number(seed, "cap", row_id) ^ number("cap", template)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_cap_keeps_the_records_of_smallest_hash(directory: Path) -> None:
    write_rows(directory / "train.et.jsonl", rows("et", 6000))
    assert render(directory, entry(include=["ask it", "name/it"])) == 0
    everything = files(directory)
    assert (
        render(directory, entry(include=["ask it", "name/it"]), max_records_per_template=50, output_directory="c") == 0
    )
    (directory / "out").rename(directory / "all")
    (directory / "c").rename(directory / "out")
    capped = files(directory)

    ids = []
    for name, records in everything.items():
        kept = sorted(records, key=lambda record: cap_key("7", record["id"], record["template"]))[:50]
        assert capped[name] == [record for record in records if record in kept]
        ids.append({record["id"] for record in kept})
    assert len(ids[0] & ids[1]) < 5, "each template keeps rows of its own"
    (part,) = json.loads((directory / "out" / "summary.json").read_text())["parts"]
    for template in part["templates"]:
        assert template["counts"]["rendered"] == 50 and template["counts"]["left_out"] == 5950


def test_cap_of_a_template_that_suits_few_rows(directory: Path) -> None:
    """One row in ten is worded by the template: what the cap keeps is of these, and the other template's is its own."""
    write_rows(directory / "train.et.jsonl", rows("et", 3000))
    few = "{name: few, input: '{% if id % 10 == 3 %}{{ text }}{% endif %}', target: x}"
    (directory / "T.yaml").write_text(f"templates:\n- {few}\n- {{name: all, input: '{{{{ text }}}}', target: x}}")
    assert render(directory, entry()) == 0
    everything = files(directory)
    for cap, kept in ((40, (40, 40)), (400, (300, 400))):
        assert render(directory, entry(), arguments=("--overwrite",), max_records_per_template=cap) == 0
        capped = files(directory)
        (part,) = json.loads((directory / "out" / "summary.json").read_text())["parts"]
        for template, number in zip(part["templates"], kept, strict=True):
            counts = template["counts"]
            assert counts["rendered"] == number == len(capped[template["file"]])
            outcomes = ("rendered", "blank", "no_input", "no_target", "failed", "left_out")
            assert sum(counts[name] for name in outcomes) == part["rows"] == 3000
            ids = {record["id"] for record in capped[template["file"]]}
            ranked = sorted(everything[template["file"]], key=lambda one: cap_key("7", one["id"], one["template"]))
            assert ids == {record["id"] for record in ranked[:cap]}


def test_two_workers_make_the_same_bytes(directory: Path) -> None:
    write_rows(directory / "train.et.jsonl", rows("et", 1100))
    everything = entry(prompts="both", variants=["plain", "3shot", "options", "2shot+cot"])
    made = []
    for workers in ("1", "2"):
        out = directory / f"out{workers}"
        arguments = ("--workers", workers, "--output-directory", str(out))
        assert render(directory, everything, arguments=arguments, max_records_per_template=1000) == 0
        made.append(contents(out))
    assert made[0] == made[1] and len(made[0]) > 10


def test_finished_parts_are_kept(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [entry(), entry(languages=["sw"], variants=["plain", "1shot"])]
    assert render(directory, *parts) == 0
    before = contents(directory / "out")
    times = {path: path.stat().st_mtime_ns for path in (directory / "out").rglob("*.jsonl")}
    capsys.readouterr()
    assert render(directory, *parts, arguments=("--json",)) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kept_files"], report["rendered_files"]) == (6, 0)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    next(path for path in times if path.parent.name == "et").unlink()
    assert render(directory, *parts, arguments=("--json",)) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kept_files"], report["rendered_files"]) == (4, 2)
    assert contents(directory / "out") == before


@pytest.mark.parametrize("change", ["templates", "source", "seed", "entries"])
def test_files_of_another_job_are_never_mixed_in(
    directory: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"variants": ["2shot"], "include": ["ask it"]}
    assert render(directory, entry(**options)) == 0
    before = contents(directory / "out")
    job: dict[str, Any] = {}
    if change == "templates":
        (directory / "T.yaml").write_text(ENGLISH.replace("Topic?", "Subject?"), encoding="utf-8")
    elif change == "source":
        write_rows(directory / "train.et.jsonl", rows("et", 31))
    elif change == "seed":
        job["seed"] = 8
    else:
        options["include"] = ["name/it"]
    assert render(directory, entry(**options), **job) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(directory / "out") == before
    assert render(directory, entry(**options), arguments=("--overwrite",), **job) == 0
    after = contents(directory / "out")
    assert after != before and len(after) == 2


def test_a_failing_part_leaves_what_is_finished(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(directory / "train.sw.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"text": "cut off')
    both = entry(languages=["et", "sw"])
    assert render(directory, both) == 2
    assert "train.sw.jsonl:31" in capsys.readouterr().err
    assert {path.parent.name for path in (directory / "out").rglob("*.jsonl*")} == {"et"}
    assert not (directory / "out" / "summary.json").exists()
    # Skipping is another setting, but the records of the finished part would be the same: it is asked for by hand.
    assert render(directory, both, arguments=("--skip-errors", "--overwrite")) == 0
    parts = json.loads((directory / "out" / "summary.json").read_text())["parts"]
    assert [sum(part["rejected_rows"].values()) for part in parts] == [0, 1]
    assert "cannot be read" in capsys.readouterr().out


def test_killed_and_run_again(directory: Path) -> None:
    write_rows(directory / "train.et.jsonl", rows("et", 1200))
    write_rows(directory / "train.sw.jsonl", rows("sw", 1200))
    both = entry(languages=["et", "sw"], variants=["plain", "3shot"])
    assert render(directory, both) == 0
    before = contents(directory / "out")
    program = (
        "import os, signal, sys\n"
        "from megatron_xmtf.cli import main\n"
        "from megatron_xmtf.prompts.jobs import output_file\n"
        "from megatron_xmtf.prompts.jobs.part_files import _PartWriter\n"
        "output_file.BUFFER_BYTES = 1000\n"
        "take, calls = _PartWriter.take, []\n"
        "def take_and_die(writer, lines):\n"
        "    take(writer, lines)\n"
        "    calls.append(lines)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "_PartWriter.take = take_and_die\n"
        "if __name__ == '__main__': main(sys.argv[1:])\n"
    )
    (directory / "dying.py").write_text(program)
    command = [sys.executable, str(directory / "dying.py"), "render", "--job", str(directory / "job.yaml")]
    command += ["--output-directory", str(directory / "killed")]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert list((directory / "killed").rglob("*.tmp-lines")), "it died in the middle of a part"
    assert not (directory / "killed" / "summary.json").exists()
    assert main(["render", "--job", str(directory / "job.yaml"), "--output-directory", str(directory / "killed")]) == 0
    assert contents(directory / "killed") == before


def test_one_process_at_a_time(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (directory / "out" / ".render").mkdir(parents=True)
    with open(directory / "out" / ".render" / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert render(directory, entry()) == 2
    assert "another process renders into" in capsys.readouterr().err


BAD = [
    (entry(split="test"), {}, "allow_test_splits: true"),
    (entry(split="test_r1"), {}, "is a test split"),
    (entry(exemplars={"source": "train.sw.jsonl", "split": "validation"}), {}, "drawn from training rows only"),
    (entry(exemplars={"source": "train.sw.jsonl", "split": "test"}), {}, "drawn from training rows only"),
    (entry(split="validation", variants=["2shot"]), {}, "variants with shots need training rows"),
    (entry(languages=["sw"], prompts="localised"), {}, "no template is worded in 'sw'"),
    (entry(prompts="localised", translation="human", exclude=["*ht"]), {}, "translated by human"),
    (entry(templates={"localised": "T.yaml"}), {}, "no template is worded in English"),
    (entry(include=["aks it"]), {}, "no template is named 'aks it'; nearest: ask it"),
    (entry(variants=["3shots"]), {}, "3shot+options+cot"),
    (entry(variants=["options"], option_styles=["dahs"]), {}, "no option style is named 'dahs'; nearest: dash"),
    (entry(variants=["options"], option_styles=[{"heading": "x"}]), {}, "{heading, marker}"),
    (entry(delimiters=[{"target": "x"}]), {}, "{input, target, separator}"),
    (entry(languages=None), {}, "exactly one of language and languages"),
    (entry(language="et"), {}, "exactly one of language and languages"),
    (entry(source="absent.jsonl"), {}, "absent.jsonl does not exist; paths in a job are relative to the job file"),
    (entry(templates="absent.yaml"), {}, "absent.yaml does not exist; paths in a job are relative to the job file"),
    (entry(source="train.{lang}.jsonl"), {}, "nothing stands for {lang}; nearest: language"),
    (entry(languages={"et": {"path": "x"}, "sw": "sw"}), {}, "sw gives no `path`, which another language gives"),
    (entry(languages={"et": {"Path": "x"}}), {}, "'Path' is no name of a placeholder"),
    (entry(languages={"et": {"language": "x"}}), {}, "'language' is no name of a placeholder"),
    (entry(source={"path": "train.et.jsonl", "where": {"topic": "c"}}), {}, "and is a (15), b (15); known"),
    (entry(source={"path": "train.et.jsonl", "feilds": {}}), {}, "unknown key 'feilds', nearest: fields"),
    (entry(languages=["../x"], source="train.et.jsonl"), {}, "is not a plain code"),
    (entry(temlpates="x"), {}, "unknown key 'entries.0.temlpates', nearest: templates"),
    (entry(config="a\x07b"), {}, "control character"),
    (entry(), {"entries": [entry(), entry()]}, "are both written to et/xp3_top_ics_et_train_ask_it.jsonl"),
    (entry(), {"name": "a/b"}, "name='a/b'"),
    (entry(), {"entries": []}, "entries"),
    (entry(source={"path": "train.et.jsonl", "fields": {"text": "txt"}}), {}, "no field 'txt'"),
]


@pytest.mark.parametrize(("values", "job", "reason"), BAD, ids=[case[2][:30] for case in BAD])
def test_mistakes_are_told_before_anything_is_written(
    directory: Path, values: dict[str, Any], job: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(directory, values, **job) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error, error
    assert not list((directory / "out").rglob("*.jsonl*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--source", "x"], "--source is not an option of a job"),
        (["--seed", "3"], "--seed is not an option of a job"),
        (["--field", "a=b"], "--field is not an option of a job"),
        (["--workers", "0"], "at least one process"),
    ],
)
def test_options_that_a_job_does_not_have(
    directory: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(directory, entry(), arguments=tuple(arguments)) == 2
    assert reason in capsys.readouterr().err


def test_evaluation_jobs_render_test_splits(directory: Path) -> None:
    assert render(directory, entry(split="test"), allow_test_splits=True) == 0
    assert len(files(directory)) == 2


def test_long_names_are_cut_and_stay_apart(directory: Path) -> None:
    texts = [f"{{name: {'மிக ' * 60}{n}, input: '{{{{ text }}}}', target: x}}" for n in range(2)]
    (directory / "T.yaml").write_text("templates:\n- " + "\n- ".join(texts), encoding="utf-8")
    assert render(directory, entry()) == 0
    names = [os.fsencode(Path(name).name) for name in files(directory)]
    assert len(names) == 2 and all(len(name) < 240 for name in names)
