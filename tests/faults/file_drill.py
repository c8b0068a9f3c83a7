"""Fault every file operation of a writer in turn, in four ways; run by test_file_operations.py under faulty_files.c.

    python -m tests.faults.file_drill SUBJECT INPUTS.pickle STRIDE

    for every operation k, for every mode:   put the disk back, write with operation k faulted, look, write again, look

Prints one JSON object: operations of an undisturbed attempt, trials, outcomes a mode, problems. No problem means that
the finished output before the attempt is untouched, that the new one is whole or absent, that success is never
reported for less than all of it, and that a second attempt makes the undisturbed bytes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xmtf.cli import main as xmtf
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.line_chunks import read_chunks
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.errors import DatasetError, ExitCode
from megatron_xmtf.files import TEMPORARY_MARK
from megatron_xmtf.parallel.launch import prepare_to_fork
from tests.faults.fault_control import CONTROL, FAULT_ROOT, MODES, Control


@dataclass
class Trial:
    """What came of one faulted attempt and what is wrong about it."""

    outcome: str
    problems: list[str]


class Subject(ABC):
    """Something that writes below `root`."""

    def __init__(self, root: Path, control: Control, inputs: Any) -> None:
        self.root, self.control, self.inputs = root, control, inputs
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make what the trials start from and are compared with."""

    @abstractmethod
    def count(self) -> int:
        """Write undisturbed; return how many operations that takes."""

    @abstractmethod
    def trial(self, target: int, mode: int) -> Trial:
        """Write with a fault, look, write again."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what `prepare` started."""


class Verb(Subject):
    """A verb of the command line, called in a forked process; one import serves all trials."""

    words: list[str]
    """The command line."""
    expected: dict[str, bytes]
    """Name -> bytes of an undisturbed output."""

    @abstractmethod
    def is_there(self) -> bool:
        """Whether a reader takes what is below `root` for a finished output."""

    def files(self) -> dict[str, bytes]:
        """Return the finished files below `root`."""
        paths = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        names = {path.relative_to(self.root).as_posix(): path for path in paths}
        return {name: path.read_bytes() for name, path in names.items() if TEMPORARY_MARK not in name}

    def call(self) -> tuple[str, str]:
        """Run the verb in a process of its own; return how it ended and what it said."""
        log = self.root.with_name("verb.log")
        child = os.fork()
        if child == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = 99
            try:
                code = xmtf(self.words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        how = "killed" if os.WIFSIGNALED(status) else ExitCode(os.WEXITSTATUS(status)).name
        return how, log.read_text(encoding="utf-8", errors="replace")

    def empty_root(self) -> None:
        """Put the disk back."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def count(self) -> int:
        self.empty_root()
        # Once in this process: what the verb imports takes seconds, and is there for all forked ones.
        with redirect_stdout(io.StringIO()):
            assert xmtf(self.words) == 0
        self.empty_root()
        self.control.arm(0, 0)
        how, said = self.call()
        assert how == "DONE", said
        operations = self.control.disarm()
        self.expected = self.files()
        assert self.is_there()
        return operations

    def trial(self, target: int, mode: int) -> Trial:
        self.empty_root()
        self.control.arm(target, mode)
        how, said = self.call()
        self.control.disarm()
        problems = []
        there = self.is_there()
        if there and self.files() != self.expected:
            problems.append("a reader takes what is there for finished, and it is not")
        if how == "DONE" and not there:
            problems.append("it reports success without an output")
        if "Traceback" in said:
            problems.append(f"a traceback instead of one message: {said.strip().splitlines()[-1]}")
        if how not in ("DONE", "FAILED", "DISK_FULL", "killed"):
            problems.append(f"it ends with {how}: {said.strip()[-300:]}")
        if how == "FAILED" and "No space left" in said:
            problems.append(f"a full disk is not said to be one: {said.strip()[-300:]}")
        if not there:
            again, said = self.call()
            if again != "DONE" or self.files() != self.expected:
                problems.append(f"the second attempt ends with {again}: {said.strip()[-300:]}")
        return Trial(how, problems)


class Preprocess(Verb):
    """`xmtf preprocess`, with many small chunks and a record of its state after each."""

    def prepare(self) -> None:
        tokenizer, records = self.inputs
        preprocess.__kwdefaults__["record_seconds"] = 0.0
        read_chunks.__kwdefaults__["chunk_bytes"] = 1200
        self.prefix = self.root / "out" / "d"
        words = ["preprocess", "--input", records, "--tokenizer", tokenizer, "--output-prefix", self.prefix]
        self.words = list(map(str, words))

    def is_there(self) -> bool:
        try:
            ExampleDataset.open(self.prefix, deep=True)
        except DatasetError:
            return False
        return True


class Pack(Verb):
    """`xmtf pack` of a run's configuration."""

    def prepare(self) -> None:
        config = self.inputs
        self.words = ["pack", str(config), f"data.index_directory={self.root / 'packing'}"]

    def is_there(self) -> bool:
        return any(TEMPORARY_MARK not in path.name for path in self.root.glob("packing/*"))


class Export(Verb):
    """`xmtf export`."""

    def prepare(self) -> None:
        self.words = ["export", "--checkpoint", str(self.inputs), "--output", str(self.root / "hf")]

    def is_there(self) -> bool:
        return (self.root / "hf").exists()


def loop(subject: Subject, stride: int) -> dict[str, Any]:
    """Fault one operation after the other; with a stride the modes share them out."""
    operations = subject.count()
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in MODES}
    problems: list[str] = []
    for number, (name, mode) in enumerate(MODES.items()):
        for target in range(1 + number * stride // len(MODES), operations + 1, stride):
            trial = subject.trial(target, mode)
            outcomes[name][trial.outcome] += 1
            problems += [f"{name} at operation {target} ({trial.outcome}): {problem}" for problem in trial.problems]
    trials = sum(sum(counter.values()) for counter in outcomes.values())
    return {"operations": operations, "trials": trials, "outcomes": outcomes, "problems": problems}


def main() -> None:
    """Run the drill that the command line names."""
    prepare_to_fork()
    subjects: dict[str, type[Subject]] = {"preprocess": Preprocess, "pack": Pack, "export": Export}
    if sys.argv[1] == "save":
        from tests.faults.save_subject import Save

        subjects["save"] = Save
    name, inputs, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    root, control = Path(os.environ[FAULT_ROOT]), Control(Path(os.environ[CONTROL]))
    subject = subjects[name](root, control, pickle.loads(inputs.read_bytes()))
    try:
        print(json.dumps(loop(subject, stride)))
    finally:
        subject.close()


if __name__ == "__main__":
    main()
