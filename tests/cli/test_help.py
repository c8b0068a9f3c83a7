"""`--help` of every verb answers without importing anything heavy, and says how to use it."""

import subprocess
import sys

import pytest

from megatron_xmtf.cli import EXIT_CODES, VERBS, build_parser, main

HEAVY = ["torch", "numpy", "transformers", "tokenizers", "pydantic", "megatron", "yaml", "rich", "jinja2"]

ALL_HELP = f"""
import sys
from megatron_xmtf.cli import VERBS, main
for words in [["--help"], *([verb, "--help"] for verb in VERBS)]:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""


def test_no_help_imports_anything_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stdout.count("usage: xmtf") == 1 + len(VERBS)


def test_a_verb_that_works_does_import_them() -> None:
    """Negative control: the list of heavy modules is one that would be seen."""
    code = f"import sys, torch, pydantic; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout
    assert "pydantic" in done.stdout


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_xmtf", "--help"], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"\n    {verb}" in done.stdout, verb
    assert EXIT_CODES in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_has_an_example_and_the_exit_codes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert EXIT_CODES in text
    assert f"xmtf {verb}" in text.split("example:")[1]


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_is_a_command_line_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    with pytest.raises(SystemExit):
        main([verb, "--help"])
    example = capsys.readouterr().out.split("example:")[1].replace("\\\n", " ")
    lines = [line.strip() for line in example.splitlines() if line.strip().startswith("xmtf ")]
    assert lines
    for line in lines:
        parsed, rest = build_parser().parse_known_args(shlex.split(line)[1:])
        assert parsed.verb == verb
        if "--" in rest:  # what a job of `submit` runs
            end = rest.index("--")
            nested, inner = build_parser().parse_known_args(rest[end + 1 :])
            assert nested.verb in VERBS and all("=" in word for word in inner), inner
            rest = rest[:end]
        assert all("=" in word for word in rest), rest


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "VERB"),
        (["trian"], "trian"),
        (["train", "train.yaml", "--no-such-flag"], "--no-such-flag"),
        (["export", "--checkpoint", "a"], "--output"),
        (["export", "--checkpoint", "a", "--output", "b", "seed=1"], "seed=1"),
        (["pack", "--data", "a", "--sequence-length", "ten"], "ten"),
    ],
)
def test_a_wrong_command_line_is_the_users_mistake(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert named in capsys.readouterr().err
