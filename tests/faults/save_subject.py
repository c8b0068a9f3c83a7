"""Saving a checkpoint as a subject of the file drill.

    on the disk before a trial      Z and A, whole, hard links of a pristine copy
    a trial                         B is saved with a fault; if that failed it is saved again; Z is pruned, at the
                                    latest behind the save that comes next

One rank serves trial after trial; only one that was killed is replaced. Its saves are those of a run: a writer
process, hashes, one rename, retention.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.directory import find_checkpoint, list_checkpoints, step_directory
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.checkpoint.retention import prune_checkpoints, reap_left_overs
from megatron_xmtf.checkpoint.saver import CheckpointSaver, SaveRequest
from megatron_xmtf.errors import CheckpointWriteError, ConfigError, DiskFullError, RankFailedError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel
from megatron_xmtf.training.trainer import Trainer
from tests.faults.fault_control import Control
from tests.faults.file_drill import Subject, Trial

Z, A, B = 1, 2, 3


class SavingRank:
    """One rank's model and saver; the weights of step N are those of the start + N - 1."""

    def __init__(self, prepared: Any, control: Control) -> None:
        torch.set_num_threads(1)  # threads that wait for each other take seconds on a busy machine
        self.prepared, self.control, self.step = prepared, control, Z
        self.trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
        self.saver = CheckpointSaver(self.trainer.chunks, self.trainer.optimizer)
        self.start = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for chunk in self.trainer.chunks for parameter in chunk.parameters())

    def go_to(self, step: int) -> None:
        """Have the weights of a step, bit by bit the same whatever steps were before it and in whichever process."""
        with torch.no_grad():
            for parameter, start in zip(self._parameters(), self.start, strict=True):
                parameter.copy_(start + float(step - Z))
        self.step = step

    def save(self, root: Path) -> None:
        """Save and prune, as a run does."""
        path = step_directory(root, self.step)
        rows = 8 * self.step
        self.saver.start(SaveRequest(path, self.step, self.prepared.config, rows, self.prepared.hf_files, {}))
        self.saver.finish()
        prune_checkpoints(root, keep_last=2, keep_every=None)

    def save_faulted(self, root: Path, target: int, mode: int) -> dict[str, Any]:
        """Save with a fault, and once more if that failed."""
        error = ""
        self.control.arm(target, mode)
        try:
            self.save(root)
        except (CheckpointWriteError, DiskFullError) as caught:
            error = type(caught).__name__
        operations = self.control.disarm()
        if error:
            try:
                self.save(root)
            except ConfigError:
                error += ", published already"
        prune_checkpoints(root, keep_last=2, keep_every=None)  # as the next save does, where this one's was the fault
        return {"error": error, "operations": operations}


def serve(prepared: Any, control: Control, requests: Connection, answers: Connection) -> None:
    """Be a rank that saves what it is asked to: (step, root, target, mode), until None."""
    rank = SavingRank(prepared, control)
    while (request := requests.recv()) is not None:
        step, root, target, mode = request
        rank.go_to(step)
        if mode < 0:
            rank.save(root)
            answers.send({})
        else:
            answers.send(rank.save_faulted(root, target, mode))
    destroy_parallel()


def keep_serving(prepared: Any, control: Control, requests: Connection, answers: Connection) -> None:
    """Start that rank, and another one whenever it was killed."""
    while True:
        try:
            run_ranks(serve, world_size=1, arguments=(prepared, control, requests, answers))
            return
        except RankFailedError as error:
            if "killed by SIGKILL" not in str(error):
                answers.send({"failed": str(error)})
                return
            answers.send({"error": "killed", "operations": control.disarm()})


class Save(Subject):
    """A checkpoint's save, with retention behind it."""

    def prepare(self) -> None:
        context = multiprocessing.get_context("fork")
        receiver, self._requests = context.Pipe(duplex=False)
        self._answers, sender = context.Pipe(duplex=False)
        context.Process(target=keep_serving, args=(self.inputs, self.control, receiver, sender)).start()
        self.pristine = self.root.with_name("pristine")
        for step in (Z, A):
            self._ask(step, self.pristine, 0, -1)
        undisturbed = self.root.with_name("undisturbed")
        self._ask(B, undisturbed, 0, -1)
        self.files = {step: open_manifest(step_directory(self.pristine, step)).files for step in (Z, A)}
        self.tensors = tensors_of(step_directory(undisturbed, B))
        before = tensors_of(step_directory(self.pristine, A))
        changed = sum(not torch.equal(before[key], self.tensors[key]) for key in before)
        assert changed > 30, f"A and B can be told apart, by {changed} tensors"

    def count(self) -> int:
        return int(self._attempt(0, 0)["operations"])

    def trial(self, target: int, mode: int) -> Trial:
        found = self._attempt(target, mode)
        killed = found["error"] == "killed"
        return Trial(found["error"].split(",")[0] or "saved", self._look(killed=killed))

    def close(self) -> None:
        self._requests.send(None)

    def _attempt(self, target: int, mode: int) -> dict[str, Any]:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.pristine, self.root, copy_function=os.link)
        return self._ask(B, self.root, target, mode)

    def _ask(self, *request: Any) -> dict[str, Any]:
        self._requests.send(request)
        answer: dict[str, Any] = self._answers.recv()
        assert "failed" not in answer, answer
        return answer

    def _look(self, *, killed: bool) -> list[str]:
        """Say what is wrong with what a trial left on the disk."""
        existing = dict(list_checkpoints(self.root))
        problems = [] if A in existing else [f"A is gone, there are {sorted(existing)}"]
        if not killed and B not in existing:
            problems.append("B is missing after the second attempt")
        if not killed and Z in existing:
            problems.append("Z was not pruned")
        for step, path in existing.items():
            manifest = open_manifest(path)
            verify_hashes(path, manifest)
            if step != B and manifest.files != self.files[step]:
                problems.append(f"step {step} holds other bytes than before")
            if step == B and not same_tensors(tensors_of(path), self.tensors):
                problems.append("B is not bit-identical")
        if find_checkpoint(self.root) != step_directory(self.root, max(existing)):
            problems.append("the newest is not found")
        reap_left_overs(self.root)
        names = {path.name for path in self.root.iterdir()} - {path.name for path in existing.values()}
        if names:
            problems.append(f"left over: {sorted(names)}")
        return problems


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Verify a checkpoint and read all of it."""
    verify_hashes(checkpoint, open_manifest(checkpoint))
    with CheckpointReader(checkpoint) as reader:
        return {key: reader.read(key) for key in reader.tensors}


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same tensors, bit by bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
