"""The real promptsource template files on real rows, as jobs: no error, every target among its choices, same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.cli import main

XCOPA = ["et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"]
XNLI = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
Entry = dict[str, Any]


def xcopa(data: Path, templates: Path, **values: Any) -> Entry:
    return {
        "dataset": "xcopa",
        "config": "{language}",
        "split": "validation",
        "languages": XCOPA,
        "task": "causal_choice",
        "source": {"path": str(data / "xcopa/data/{language}/val.{language}.jsonl"), "fields": {"id": "idx"}},
        "templates": {
            "english": str(templates / "xcopa/en/templates.yaml"),
            "localised": str(templates / "xcopa/{prompt_language}/templates.yaml"),
        },
        "prompts": "both",
        **values,
    }


def question_answering(data: Path, templates: Path) -> list[Entry]:
    source = {"path": str(data / "xquad/xquad.{language}.json"), "format": "squad"}
    both = {
        "english": str(templates / "xquad/xquad.en/templates.yaml"),
        "localised": str(templates / "xquad/xquad.{prompt_language}/templates.yaml"),
    }
    every = {"split": "validation", "source": source, "limit": 60}
    english = {**every, "language": "en"}
    passage = {**source, "fields": {"passage_text": "context", "question_text": "question", "document_title": "title"}}
    goldp = [{"template": name} for name in ("english", "arabic")]
    return [
        {**every, "dataset": "xquad", "config": "{language}", "languages": ["ar", "en", "es", "hi", "zh"]}
        | {"templates": both, "prompts": "both"},
        {**english, "dataset": "mlqa", "templates": str(templates / "mlqa/mlqa.en.en/templates.yaml")},
        {**english, "dataset": "squad_v2", "templates": str(templates / "squad_v2/templates.yaml")},
        *(
            {**every, "source": {**passage, "constants": {"language": one["template"]}}, "dataset": "tydiqa-goldp"}
            | {"language": code, "prompts": prompts, "on_error": "raise"}
            | {"templates": str(templates / f"khalidalt/tydiqa-goldp/{one['template']}/templates.yaml")}
            for one, code, prompts in zip(goldp, ("en", "ar"), ("english", "localised"), strict=True)
        ),
    ]


def pairs(data: Path, templates: Path, work: Path) -> list[Entry]:
    """Entailment and similarity; labels of the former are numbers in the templates, letters in the file."""
    numbers = {"e": 0, "n": 1, "c": 2}
    lines = (data / "indonli/val.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    numbered = "".join(json.dumps({**row, "label": numbers[row["label"]]}) + "\n" for row in rows)
    (work / "indonli.jsonl").write_text(numbered, encoding="utf-8")
    nli = {"split": "validation", "source": str(work / "indonli.jsonl"), "language": "id"}
    entries = [
        {**nli, "dataset": "xnli", "config": code, "languages": {"id": code}, "language": None}
        | {"templates": str(templates / f"xnli/{code}/templates.yaml")}
        | {"prompts": "english" if code == "en" else "localised"}
        for code in XNLI
    ]
    anli = {**nli, "dataset": "anli", "templates": str(templates / "anli/templates.yaml")}
    similar = {"path": str(data / "jglue/jsts-v1.3/valid-v1.3.json"), "format": "jsonl"}
    similar["fields"] = {"similarity_score": "label", "id": "sentence_pair_id"}  # type: ignore[assignment]
    stsb = {"dataset": "stsb", "split": "dev", "language": "ja", "source": similar, "limit": 100}
    stsb["templates"] = str(templates / "stsb_multi_mt/en/templates.yaml")
    copa = xcopa(data, templates, dataset="copa", languages=["it"], prompts="english")
    copa["templates"] = str(templates / "super_glue/copa/templates.yaml")
    return [*entries, anli, stsb, copa]


def translation(data: Path, templates: Path) -> list[Entry]:
    """Aligned sentences, by the templates of three translation sets."""
    english, swahili = data / "ntrex/newstest2019-src.eng.txt", data / "ntrex/newstest2019-ref.swa.txt"
    tatoeba = {"format": "lines", "aligned": {"sourceString": str(english), "targetString": str(swahili)}}
    flores: Entry = {"format": "lines", "aligned": {"source": str(english), "target": str(swahili)}}
    flores["constants"] = {"source_language_name": "English", "target_language_name": "Swahili"}
    every = {"split": "train", "language": "sw", "limit": 150}
    root = templates.parents[1] / "xp3x" / "templates"
    files = {
        "tatoeba": (tatoeba, templates / "Helsinki-NLP/tatoeba_mt/eng-swa/templates.yaml"),
        "flores": (flores, root / "facebook/flores/x_x/templates.yaml"),
        "wmt22": (flores, root / "allenai/wmt22_african/x_x/templates.yaml"),
    }
    return [
        {**every, "dataset": name, "source": source, "templates": str(file)} for name, (source, file) in files.items()
    ]


def records_of(output: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(output.rglob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def contents(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*.json*")
        if ".render" not in path.parts
    }


def render(work: Path, entries: list[Entry], name: str, *arguments: str, **job: Any) -> Path:
    entries = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    (work / "job.yaml").write_text(json.dumps({"entries": entries, "seed": 1, **job}), encoding="utf-8")
    assert main(["render", "--job", str(work / "job.yaml"), "--output-directory", str(work / name), *arguments]) == 0
    return work / name


@pytest.mark.slow
def test_all_template_files_with_data(shared_data: Path, tmp_path: Path) -> None:
    templates = shared_data / "promptsource_templates" / "xp3mt" / "templates"
    entries = [
        xcopa(shared_data, templates),
        *question_answering(shared_data, templates),
        *pairs(shared_data, templates, tmp_path),
        *translation(shared_data, templates),
    ]
    output = render(tmp_path, entries, "one")
    records = records_of(output)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert len(records) == summary["records"] > 6000
    assert all(record["targets"] in record["choices"] for record in records if "choices" in record)
    assert sum("choices" in record for record in records) > 6000
    counts = [template["counts"] for part in summary["parts"] for template in part["templates"]]
    assert sum(one["failed"] for one in counts) == 0 and not any(one["rejected"] for one in counts)
    assert {record["dataset"] for record in records} >= {
        "xcopa",
        "xquad",
        "xnli",
        "squad_v2",
        "tatoeba",
        "stsb",
        "copa",
    }
    assert contents(render(tmp_path, entries, "again")) == contents(output)
    assert contents(render(tmp_path, entries, "two", "--workers", "2")) == contents(output)


def test_few_shot_options_and_thoughts_on_real_rows(shared_data: Path, tmp_path: Path) -> None:
    """SIB-200 with lists and letters, CREAK with rationales: exemplars out of other rows of the training split."""
    examples = Path(__file__).parents[2] / "examples" / "templates"
    sib = {
        "dataset": "sib200",
        "config": "{language}",
        "split": "train",
        "languages": ["swh_Latn", "zho_Hans"],
        "source": {"path": str(shared_data / "sib200/{language}/train.tsv"), "quoting": "csv"}
        | {"fields": {"id": "index_id"}},
        "templates": str(examples / "sib200.yaml"),
        "prompts": "both",
        "limit": 120,
        "variants": ["plain", "options", "letters", "3shot", "3shot+letters"],
    }
    thoughts = "templates:\n- {name: ask, input: '{{ input }}', target: '{{ answer }}', rationale: '{{ rationale }}'}\n"
    (tmp_path / "creak.yaml").write_text(thoughts, encoding="utf-8")
    creak = {
        "dataset": "creak",
        "split": "train",
        "language": "en",
        "source": {"path": str(shared_data / "flan_cot/creak_train.tsv"), "quoting": "none"}
        | {"columns": ["input", "answer", "rationale"]},
        "templates": "creak.yaml",
        "limit": 200,
        "variants": ["plain", "cot", "2shot+cot"],
        "delimiters": [{"input": "<<", "target": "||", "separator": ">>"}],
    }
    records = records_of(render(tmp_path, [sib, creak], "out"))
    listed = [record for record in records if record["template"].endswith(("+options", "+letters"))]
    assert len(listed) > 1000
    plain = {(r["id"], r["language"], r["template"]): r for r in records if "+" not in r["template"]}
    for record in listed:
        name = record["template"].partition("+")[0]
        choices = plain[record["id"], record["language"], name]["choices"]
        question = record["inputs"].split("\n\n")[-1]
        assert all(choice in question for choice in choices), "every choice is listed in the question"
        assert record["targets"] in record["choices"]
    rows = [
        line.split("\t") for line in (shared_data / "flan_cot/creak_train.tsv").read_text("utf-8").splitlines()[:200]
    ]
    for record in records:
        if record["dataset"] == "creak" and "cot" in record["template"]:
            inputs, answer, rationale = rows[int(record["id"].rpartition(":")[2])]
            assert record["targets"] == f"{rationale}\n{answer}"
            shown = [text.split("||") for text in record["inputs"].replace("<<", "").split(">>")[:-1]]
            assert len(shown) == (2 if "2shot" in record["template"] else 0)
            for question, reply in shown:
                assert question != inputs and reply in {
                    f"{r.strip()}\n{a.strip()}" for q, a, r in rows if q.strip() == question
                }


def test_the_worked_job_of_the_documentation_is_one() -> None:
    import re

    from megatron_xmtf.config import config_from_mapping
    from megatron_xmtf.prompts.jobs.render_job import RenderJob

    text = (Path(__file__).parents[2] / "docs" / "rendering.md").read_text(encoding="utf-8")
    (job,) = [
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "entries:" in block
    ]
    assert len(config_from_mapping(job, RenderJob, source="rendering.md").entries) == 3
