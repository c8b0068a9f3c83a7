"""Kill processes of a run of two ranks at random moments, start the same command again, and compare with no kill.

    python -m tests.faults.kill_drill CONFIG.pickle DIRECTORY TRIALS SEED

The engine is imported once; every run is forked from there, as `xmtf train --nproc 2` would start it. Who is killed:
one rank, all processes of the run, its launcher alone, or the writer of a checkpoint. A third of the runs is killed
a second time after it went on. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from megatron_xmtf.checkpoint.directory import list_checkpoints
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import XmtfError
from megatron_xmtf.parallel.launch import prepare_to_fork
from megatron_xmtf.training.launch import train
from tests.faults.save_subject import same_tensors, tensors_of

COUNTED = ("loss", "grad_norm", "learning_rate", "rows", "examples", "tokens", "target_tokens", "skipped")
VICTIMS = ("one rank", "one rank", "everything", "everything", "the launcher", "a writer")
END_SECONDS = 120.0
"""Longest that a run may outlive one of its processes; five seconds on an idle machine, this is for busy ones."""


class Run:
    """`xmtf train CONFIG --nproc 2` in a process group of its own."""

    def __init__(self, config: RunConfig) -> None:
        self.log = Path(config.output).with_suffix(".log")
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = 99
            try:
                code = int(train(config, nproc=2)["exit_code"])
            except XmtfError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                code = int(error.exit_code)
            finally:
                sys.stderr.flush()
                os._exit(code)
        self.code: int | None = None

    def wait(self, seconds: float) -> bool:
        """Wait for the launcher at most so long; return whether it has ended."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return False
            else:
                time.sleep(0.005)
        return True

    def processes(self) -> list[psutil.Process]:
        """List the launcher's descendants: ranks first, then their writers."""
        try:
            ranks = psutil.Process(self.pid).children()
            return ranks + [writer for rank in ranks for writer in rank.children()]
        except psutil.NoSuchProcess:
            return []

    def kill(self, victim: str, chance: random.Random) -> bool:
        """Kill; return whether there was anybody to kill."""
        try:
            if victim in ("everything", "the launcher"):
                (os.killpg if victim == "everything" else os.kill)(self.pid, signal.SIGKILL)
                return True
            parents = {self.pid} if victim == "one rank" else None
            found = [one for one in self.processes() if (one.ppid() in parents if parents else one.ppid() != self.pid)]
            if found:
                chance.choice(found).kill()
            return bool(found)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the half of a line, of a killed run
    return found


def trial(config: RunConfig, chance: random.Random, duration: float, expected: Any) -> tuple[str, list[str], int]:
    """Kill a run once or twice, let it end; return who was killed, what is wrong, and the steps trained twice."""
    output = Path(config.output)
    shutil.rmtree(output, ignore_errors=True)
    kills = 1 + (chance.random() < 1 / 3)
    told, problems, again = [], [], 0
    for _ in range(kills):
        run, victim = Run(config), chance.choice(VICTIMS)
        run.wait(chance.uniform(0, duration))
        # A writer lives for a moment: wait for one.
        deadline = time.monotonic() + duration
        while run.code is None and not run.kill(victim, chance) and time.monotonic() < deadline:
            run.wait(0.002)
        told.append(victim)
        if not run.wait(END_SECONDS):
            problems.append(f"the run goes on {END_SECONDS:g} s after {victim} was killed")
            os.killpg(run.pid, signal.SIGKILL)
            run.wait(END_SECONDS)
        if run.code not in (0, 1, -signal.SIGKILL):
            problems.append(f"exit code {run.code} after {victim} was killed: {run.log.read_text()[-500:]}")
        done, newest = [line["step"] for line in metrics_of(output)], 0
        for step, path in list_checkpoints(output / "checkpoints") if (output / "checkpoints").is_dir() else []:
            verify_hashes(path, open_manifest(path))
            newest = step
        again = max(again, max(done, default=0) - newest)
    run = Run(config)  # at once: what is left of the killed run has to be waited for
    if not run.wait(END_SECONDS + 10 * duration) or run.code != 0:
        problems.append(f"the same command ends with {run.code}: {run.log.read_text()[-500:]}")
        return " and ".join(told), problems, again
    metrics, tensors = expected
    found = metrics_of(output)
    if [line["step"] for line in found] != [line["step"] for line in metrics]:
        problems.append(f"metrics.jsonl has steps {[line['step'] for line in found]}")
    elif any(ours[key] != theirs[key] for ours, theirs in zip(found, metrics, strict=True) for key in COUNTED):
        problems.append("the curve is another one")
    if not same_tensors(tensors_of(list_checkpoints(output)[-1][1]), tensors):
        problems.append("the last weights or optimizer state are others")
    return " and ".join(told), problems, again


def main() -> None:
    """Run undisturbed, then so many trials."""
    config: RunConfig = pickle.loads(Path(sys.argv[1]).read_bytes())
    directory, trials, chance = Path(sys.argv[2]), int(sys.argv[3]), random.Random(sys.argv[4])
    prepare_to_fork()

    def at(name: str) -> RunConfig:
        return config.model_copy(update={"output": str(directory / name)})

    durations = []
    for name in ("first", "undisturbed"):
        started = time.monotonic()
        run = Run(at(name))
        assert run.wait(600) and run.code == 0, run.log.read_text()[-3000:]
        durations.append(time.monotonic() - started)
    metrics = metrics_of(directory / "undisturbed")
    assert [line["step"] for line in metrics] == list(range(1, config.train_steps + 1))
    tensors = tensors_of(list_checkpoints(directory / "undisturbed")[-1][1])
    outcomes: Counter[str] = Counter()
    problems, most = [], 0
    for number in range(trials):
        told, wrong, again = trial(at("killed"), chance, min(durations), (metrics, tensors))
        outcomes[told] += 1
        most = max(most, again)
        problems += [f"trial {number}, {told} killed: {problem}" for problem in wrong]
    result = {"trials": trials, "outcomes": outcomes, "most_steps_again": most, "problems": problems}
    print(json.dumps({**result, "undisturbed_seconds": round(min(durations), 2)}))


if __name__ == "__main__":
    main()
