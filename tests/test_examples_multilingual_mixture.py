"""The walk-through of examples/multilingual_mixture: its commands run as printed, and print what it says they print."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WALK = Path("examples") / "multilingual_mixture"
README = (ROOT / WALK / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(bash test|bash mistake|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def squeezed(text: str) -> str:
    """Take runs of spaces for one: columns move when another command's output is wider."""
    return re.sub(r" +", " ", text).strip()


@pytest.fixture(scope="module")
def directory(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of the examples, as in a checkout."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", root / "examples", symlinks=True, ignore=shutil.ignore_patterns("data"))
    os.environ["XMTF_SHARED_DATA"] = str(shared_data)
    return root


def run(block: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    command = ["bash", "-eu", "-o", "pipefail", "-c", block]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)


def test_walk(directory: Path) -> None:
    """Every command in its order; every printed line, but for `...`, is among the lines of the command above it."""
    printed, seen = "", Counter[str]()
    for kind, block in BLOCK.findall(README):
        seen[kind] += 1
        if kind == "text":
            lines = {squeezed(line) for line in printed.splitlines()}
            for line in block.splitlines():
                assert line == "..." or squeezed(line) in lines, (
                    f"the README says that this is printed:\n{line}\n{printed}"
                )
            continue
        done = run(block, directory)
        printed = done.stdout + done.stderr
        assert done.returncode == (2 if kind == "bash mistake" else 0), f"{block}\n{printed}"
    assert seen["bash test"] >= 7 and seen["bash mistake"] >= 3 and seen["text"] >= 7
    check_records(directory)


def check_records(directory: Path) -> None:
    """Count and compare what the walk has made by means of its own: files, caps, documents, languages."""
    records = {
        path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (directory / "walk" / "records").glob("*/*.jsonl")
    }
    caps = {path: 20 if "sib200" in path.name else 30 for path in records}
    assert all(len(found) == caps[path] for path, found in records.items()), "a file holds as many as its cap"
    everything = [record for found in records.values() for record in found]
    assert len({record["language"] for record in everything}) == 16 and len({r["dataset"] for r in everything}) == 7
    held_out = "".join(path.read_text(encoding="utf-8") for path in (directory / "walk" / "held_out").glob("*/*.jsonl"))
    asked = {json.loads(line)["inputs"] for line in held_out.splitlines()}
    assert not asked & {record["inputs"] for record in everything}
    assert not {r["language"] for r in everything if r["dataset"] == "sib200"} & {"tam_Taml", "yor_Latn"}
    assert all("document" in record for record in everything if record["dataset"] in ("ntrex", "xquad"))
    thoughts = [record for record in everything if record["template"].endswith("+cot")]
    assert thoughts and all(len(record["targets"]) > 20 and "choices" not in record for record in thoughts)


def test_files_named_in_the_walk_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / WALK / target).exists(), target
