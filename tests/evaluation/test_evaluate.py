"""From task files to results.json, the report and the table, as a user runs it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_xmtf.cli import main
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import TokenizerError
from megatron_xmtf.evaluation.ask import check_vocabulary, evaluate_tasks
from megatron_xmtf.evaluation.evaluate import _generate
from megatron_xmtf.evaluation.huggingface import HuggingFaceBackend
from megatron_xmtf.evaluation.tasks import load_tasks

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> list[Path]:
    """Ranking in two languages, and generation whose answer for even questions is what the model says."""
    directory = tmp_path_factory.mktemp("tasks")
    with open(directory / "days.jsonl", "w", encoding="utf-8") as stream:
        for i in range(14):
            choices = [DAYS[(i + 1) % 7], DAYS[(i + 3) % 7], DAYS[(i + 5) % 7]][: 2 + i % 2]
            record = {"inputs": f"After {DAYS[i % 7]}?", "targets": choices[0], "choices": choices}
            stream.write(json.dumps({**record, "language": ["en", "de"][i // 7], "template": "after"}) + "\n")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_hf), AutoTokenizer.from_pretrained(tiny_hf)
    with open(directory / "say.jsonl", "w", encoding="utf-8") as stream:
        asked = 0
        for prompt in (first + second for first in "abcdefghij" for second in "klmnopqrst"):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
            text = tokenizer.decode(said[0, ids.size(1) :], skip_special_tokens=True)
            if asked < 7 and text.strip():  # a random model often says nothing that can be written down
                target = text if asked % 2 == 0 else "something else"
                stream.write(json.dumps({"inputs": prompt, "targets": target, "language": "en"}) + "\n")
                asked += 1
    assert asked == 7
    (directory / "days.yaml").write_text("- {name: days, records: days.jsonl}\n")
    (directory / "say.yaml").write_text(
        "- {name: say, records: say.jsonl, metric: exact_match, generation: {max_new_tokens: 5}}\n"
    )
    return [directory / "days.yaml", directory / "say.yaml"]


class Tags(HTMLParser):
    """Collects tags, and addresses that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "data", "href")]


def test_results_of_both_metrics(tiny_hf: Path, task_files: list[Path]) -> None:
    tokenizer, backend = Tokenizer.load(tiny_hf), HuggingFaceBackend.load(tiny_hf)
    results = evaluate_tasks(load_tasks(task_files), backend=backend, tokenizer=tokenizer, show_progress=False)
    assert [(r.task, r.language, r.template, r.metric, r.n) for r in results] == [
        ("days", "en", "after", "accuracy", 7),
        ("days", "de", "after", "accuracy", 7),
        ("say", "en", "", "exact_match", 7),
    ]
    assert results[2].value == pytest.approx(4 / 7), "the even ones of seven"
    assert results[0].chance == pytest.approx((4 / 2 + 3 / 3) / 7)
    assert results[0].majority == 1.0, "the first choice is always right"


def test_verb_writes_results_report_and_table(
    tiny_hf: Path, task_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--hf", str(tiny_hf), "--tasks", *map(str, task_files), "--output", str(tmp_path / "out")]
    assert main(["evaluate", *arguments]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["language", "days", "say", "(exact_match)"]
    written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {"model", "step", "config_hash", "versions", "results"} <= set(written)
    keys = "task dataset language template template_language metric value stderr n chance majority".split()
    assert all(set(keys) <= set(result) for result in written["results"]) and len(written["results"]) == 3
    page = Tags((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2 and page.tags.count("table") == 1 and "script" not in page.tags
    assert all(address.startswith("#") for address in page.loaded), "the page must load nothing"
    assert main(["evaluate", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_generate_verb(tiny_hf: Path, tiny_mt5_hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "Monday", "--prompt", "lundi\nmardi"]
    for directory in (tiny_hf, tiny_mt5_hf):
        arguments = ["generate", "--hf", str(directory), *prompts, "--max-new-tokens", "4"]
        assert main([*arguments, "--json"]) == 0
        answers = json.loads(capsys.readouterr().out)
        assert [answer["prompt"] for answer in answers] == ["Monday", "lundi\nmardi"]
        assert main(arguments) == 0
        first, second = ("\n        ".join(answer["text"].strip().splitlines()) for answer in answers)
        expected = f"prompt  Monday\ntext    {first}\n\nprompt  lundi\n        mardi\ntext    {second}\n"
        assert capsys.readouterr().out == expected


def test_a_prompt_that_loses_its_beginning_is_told(tiny_hf: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = HuggingFaceBackend.load(tiny_hf)
    backend.max_length = 8
    arguments = {"backend": backend, "tokenizer": Tokenizer.load(tiny_hf), "show_progress": True}
    _generate(["abc", "abcd"], 4, **arguments)  # a byte is a token
    assert not caplog.messages
    _generate(["abc", "abcde"], 4, **arguments)
    assert "1 of 2 prompts lost their beginning: with 4 new tokens they exceed the 8 tokens" in caplog.text


def test_prompts_and_texts_are_told_apart() -> None:
    from megatron_xmtf.cli.generate import _word

    assert _word(" Monday?", " Tuesday\nWednesday\n", dim=False) == (
        "prompt  Monday?\ntext    Tuesday\n        Wednesday"
    )
    assert _word("Monday?", "", dim=True) == "\x1b[2mprompt  Monday?\x1b[0m\ntext    "


def test_user_mistakes_end_with_2_and_write_nothing(
    tiny_hf: Path, task_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("- {name: a, language: en, records: a.jsonl, metric: f1}\n")
    hf, tasks, output = str(tiny_hf), str(task_files[0]), str(tmp_path / "out")
    cases = [
        (["evaluate"], "name a model"),
        (["evaluate", "--hf", hf, "--tasks", str(bad), "--output", output], "metric='f1'"),
        (["evaluate", "--hf", hf, "--tasks", str(tmp_path / "no.yaml"), "--output", output], "does not exist"),
        (["evaluate", "--hf", str(tmp_path / "no"), "--tasks", tasks, "--output", output], "does not exist"),
        (["evaluate", "--hf", hf, "--tasks", tasks], "--output DIR"),
        (["evaluate", "--hf", hf, "--tasks", tasks, "--output", output, "--nproc", "2"], "one process"),
        (["evaluate", "--checkpoint", hf, "--tasks", tasks, "--output", output], "xmtf import"),
        (["evaluate", "c.yaml", "--hf", hf, "--tasks", tasks, "--output", output], "give one of them"),
        (["evaluate", str(tmp_path / "c.yaml")], "does not exist"),
        (["generate", "--prompt", "a"], "name a model"),
        (["generate", "--hf", hf, "--prompt", ""], "becomes no token"),
        (["generate", "--hf", hf, "--prompt", "a", "--max-new-tokens", "0"], "at least one"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err, captured.err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_hf: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    small = HuggingFaceBackend(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=8, n_layer=1, n_head=1)))
    with pytest.raises(TokenizerError, match="vocabulary is 64"):
        check_vocabulary(Tokenizer.load(tiny_hf), small)
