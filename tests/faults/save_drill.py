"""Save checkpoints under faults of the file system; run by test_checkpoint_save.py with faulty_files.c preloaded.

    python -m tests.faults.save_drill PREPARED.pickle STRIDE

Each trial forks one rank: it saves A, changes every weight, and saves B with operation k faulted, as a run does
(publish, prune, and once more if it failed). Then the parent looks at what is on the disk. Prints one JSON object.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint, list_checkpoints, step_directory
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.retention import prune_checkpoints, reap_left_overs
from megatron_xmtf.checkpoint.safe_read import CheckpointReader
from megatron_xmtf.checkpoint.saver import CheckpointSaver, SaveRequest
from megatron_xmtf.errors import CheckpointWriteError, ConfigError, DiskFullError
from megatron_xmtf.parallel.launch import prepare_to_fork, run_ranks
from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel
from megatron_xmtf.training.trainer import Trainer

MODES = {"fail once": 1, "fail forever": 2, "short write": 3, "kill": 4}
A, B = 1, 2


class Control:
    """The page that faulty_files.c reads."""

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as stream:
            self._page = mmap.mmap(stream.fileno(), 32)

    def arm(self, target: int, mode: int) -> None:
        """Count from zero, and fault this operation; 0: none."""
        self._page[:32] = struct.pack("<4q", 0, 0, mode, errno.ENOSPC if target % 2 else errno.EIO)
        self._page[8:16] = struct.pack("<q", target)

    @property
    def count(self) -> int:
        """Operations since `arm`."""
        (count,) = struct.unpack("<q", self._page[:8])
        return int(count)


def rank_saves(prepared: Any, root: Path, control: Control, target: int, mode: int) -> dict[str, Any]:
    """Save A, then B with a fault, then B again if it failed."""
    torch.set_num_threads(1)  # threads that wait for each other take seconds on a busy machine
    trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    saver = CheckpointSaver(trainer.chunks, trainer.optimizer)

    def save(step: int) -> None:
        saver.start(
            SaveRequest(step_directory(root, step), step, prepared.config, 8 * step, trainer.prepared.hf_files, {})
        )
        saver.finish()
        prune_checkpoints(root, keep_last=2, keep_every=None)

    save(A)
    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.add_(1.0)
    found: dict[str, Any] = {"error": "", "retry": ""}
    control.arm(target, mode)
    try:
        save(B)
    except (CheckpointWriteError, DiskFullError) as error:
        found["error"] = type(error).__name__
    found["operations"] = control.count
    control.arm(0, 0)
    if found["error"]:
        try:
            save(B)
        except ConfigError:
            found["retry"] = "published already"
    destroy_parallel()
    return found


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Verify a checkpoint and read all of it."""
    verify_hashes(checkpoint, open_manifest(checkpoint))
    with CheckpointReader(checkpoint) as reader:
        return {key: reader.read(key) for key in reader.tensors}


def look(root: Path, expected: dict[int, dict[str, torch.Tensor]], *, killed: bool) -> list[str]:
    """Say what is wrong with what a trial left on the disk; nothing is what it should be."""
    problems = []
    steps = [step for step, _ in list_checkpoints(root)]
    if A not in steps:
        problems.append(f"A is gone, there are {steps}")
    if not killed and B not in steps:
        problems.append("B is missing after the retry")
    for step, path in list_checkpoints(root):
        tensors = tensors_of(path)
        if tensors.keys() != expected[step].keys():
            problems.append(f"step {step} holds other tensors")
        elif not all(torch.equal(tensors[key], expected[step][key]) for key in tensors):
            problems.append(f"step {step} is not bit-identical")
    if find_checkpoint(root) != step_directory(root, max(steps)):
        problems.append("the newest is not found")
    reap_left_overs(root)
    left = sorted(path.name for path in root.iterdir() if path.name not in {f"step_{step:07d}" for step in (A, B)})
    if left:
        problems.append(f"left over: {left}")
    return problems


def trial(prepared: Any, root: Path, control: Control, target: int, mode: int) -> dict[str, Any]:
    """Run one rank in a process of its own; `error` is "killed" if it did not survive."""
    control.arm(0, 0)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    try:
        (found,) = run_ranks(rank_saves, world_size=1, arguments=(prepared, root, control, target, mode))
    except Exception as error:
        if "killed by SIGKILL" not in str(error):
            raise
        found = {"error": "killed", "retry": "", "operations": control.count}
    control.arm(0, 0)
    return dict(found)


def main() -> None:
    """Count the operations of an undisturbed save, then fault them one at a time."""
    prepare_to_fork()
    with open(sys.argv[1], "rb") as stream:
        prepared = pickle.load(stream)
    root, stride = Path(os.environ["XMTF_FAULT_ROOT"]), int(sys.argv[2])
    control = Control(Path(os.environ["XMTF_FAULT_CONTROL"]))
    operations = trial(prepared, root, control, 0, 0)["operations"]
    expected = {step: tensors_of(step_directory(root, step)) for step in (A, B)}
    different = sum(not torch.equal(expected[A][key], expected[B][key]) for key in expected[A])
    outcomes: dict[str, dict[str, int]] = {name: {} for name in MODES}
    problems, trials = [], 0
    for number, (name, mode) in enumerate(MODES.items()):
        for target in range(1 + number * stride // len(MODES), operations + 1, stride):
            found = trial(prepared, root, control, target, mode)
            trials += 1
            key = found["error"] or "saved"
            outcomes[name][key] = outcomes[name].get(key, 0) + 1
            wrong = look(root, expected, killed=found["error"] == "killed")
            problems += [f"{name} at operation {target} ({key}): {problem}" for problem in wrong]
    print(
        json.dumps(
            {
                "operations": operations,
                "trials": trials,
                "tensors_that_differ_between_a_and_b": different,
                "outcomes": outcomes,
                "problems": problems,
            }
        )
    )


if __name__ == "__main__":
    main()
