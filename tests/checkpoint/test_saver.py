"""A save that fails on one rank is one error on all, in time, and leaves nothing; what is saved is a snapshot."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.checkpoint import saver as saver_module
from megatron_xmtf.checkpoint import shard_writer
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.checkpoint.saver import CheckpointSaver, SaveRequest
from megatron_xmtf.config import RunConfig
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel
from megatron_xmtf.streamed_io import write_once
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.checkpoint.test_sharded import read_tensors

SECONDS = 20.0
"""Far below any collective's timeout (10 minutes): what takes longer was waited for in one."""

Outcome = tuple[str, str, float, list[str]]
"""Class of the error, message, seconds until it came, names in the checkpoints directory afterwards."""


@contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute; forked writers inherit it."""
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def slow(*arguments: Any, **keywords: Any) -> Any:
    """Write a second later than asked: the training goes on meanwhile."""
    time.sleep(1.0)
    return shard_writer.WRITE_PART(*arguments, **keywords)  # type: ignore[attr-defined]


def hanging(*arguments: Any, **keywords: Any) -> Any:
    time.sleep(300)


def full(*arguments: Any, **keywords: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused(*arguments: Any, **keywords: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "checkpoints")


def lose_a_byte(descriptor: int, data: memoryview, offset: int) -> None:
    """Say that all was written and write one byte less, as a broken file system does."""
    write_once(descriptor, data[:-1], offset)


class Drill:
    """One rank's saves of one trainer."""

    def __init__(self, prepared: PreparedRun) -> None:
        self.topology = initialize_parallel(prepared.config.parallel, seed=1)
        self.trainer = Trainer(prepared, self.topology)
        self.config = prepared.config
        self.directory = Path(prepared.config.output) / "checkpoints"
        self.saver = CheckpointSaver(self.trainer.chunks, self.trainer.optimizer)
        shard_writer.WRITE_PART = shard_writer.write_part  # type: ignore[attr-defined]

    def request(self, step: int) -> SaveRequest:
        return SaveRequest(
            path=self.directory / f"step_{step:07d}",
            step=step,
            config=self.config,
            consumed_rows=8 * step,
            hf_files=self.trainer.prepared.hf_files,
            metrics={},
        )

    def outcome(self, step: int, *, after_start: Callable[[], None] = lambda: None) -> Outcome:
        """Save, and say how it ended on this rank; the last names are those that all ranks left."""
        started = time.monotonic()
        kind, message = "", ""
        try:
            self.saver.start(self.request(step))
            after_start()
            self.saver.finish()
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        seconds = time.monotonic() - started
        torch.distributed.barrier()
        names = sorted(path.name for path in self.directory.iterdir())
        torch.distributed.barrier()
        return kind, message, seconds, names

    def kill_own_writer(self) -> None:
        underway = self.saver._underway
        assert underway is not None and isinstance(underway.writer, shard_writer.ShardWriter)
        assert underway.writer.process_id is not None
        os.kill(underway.writer.process_id, signal.SIGKILL)


def rank_faults(prepared: PreparedRun) -> dict[str, Outcome]:
    """Save with one fault after the other on one of the two ranks, then without."""
    drill = Drill(prepared)
    drill.trainer.train_step()
    first = drill.topology.rank == 0
    outcomes = {"before": drill.outcome(1)}
    with replaced(shard_writer, "write_part", slow if first else hanging):
        outcomes["killed"] = drill.outcome(2, after_start=lambda: None if first else drill.kill_own_writer())
    with (
        replaced(shard_writer, "write_part", hanging if first else shard_writer.write_part),
        replaced(drill.saver, "_timeout_seconds", 1.0),
    ):
        outcomes["hanging"] = drill.outcome(2)
    with replaced(shard_writer, "write_part", shard_writer.write_part if first else full):
        outcomes["full"] = drill.outcome(2)
    with replaced(shard_writer, "write_once", write_once if first else lose_a_byte):
        outcomes["lost byte"] = drill.outcome(2)
    with replaced(saver_module, "begin_checkpoint", refused):
        outcomes["refused at the start"] = drill.outcome(2)
    with replaced(saver_module, "write_json", refused):
        outcomes["refused at the end"] = drill.outcome(2)
    with replaced(saver_module, "write_json", full):
        outcomes["full at the end"] = drill.outcome(2)
    with replaced(
        multiprocessing.process.BaseProcess, "start", multiprocessing.process.BaseProcess.start if first else full
    ):
        outcomes["no process"] = drill.outcome(2)
    with replaced(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20)):  # type: ignore[attr-defined]
        outcomes["no room"] = drill.outcome(2)
    outcomes["after"] = drill.outcome(2)
    assert multiprocessing.active_children() == [], "a writer was left behind"
    destroy_parallel()
    return outcomes


@pytest.fixture(scope="module")
def faults(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both ranks' outcomes of every fault, and the run directory."""
    from tests.conftest import make_run_config

    make = make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("faults"))
    prepared = prepare_run(make(parallel={"tensor_model_parallel_size": 2}), world_size=2)
    return run_ranks(rank_faults, world_size=2, arguments=(prepared,)), Path(prepared.config.output)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("killed", "CheckpointWriteError", ["rank 1: the writer (process ", "was ended by SIGKILL", "without memory"]),
        ("hanging", "CheckpointWriteError", ["rank 0: the writer", "had not finished after 0.0166667 minutes"]),
        ("full", "DiskFullError", ["rank 1: ", "No space left on device", "checkpoint.keep_last"]),
        ("lost byte", "CheckpointWriteError", ["rank 1: ", "reads back as", "loses data"]),
        ("refused at the start", "CheckpointWriteError", ["rank 0: ", "Permission denied"]),
        ("refused at the end", "CheckpointWriteError", ["rank 0: ", "Permission denied"]),
        ("full at the end", "DiskFullError", ["rank 0: ", "No space left"]),
        ("no process", "DiskFullError", ["rank 1: no writer could be started"]),
        ("no room", "DiskFullError", ["GiB and 0.00 GiB are free", "nothing was written"]),
    ],
)
def test_one_ranks_fault_is_one_error_on_all_ranks_in_time(
    faults: Any, fault: str, kind: str, words: list[str]
) -> None:
    for found, message, seconds, names in (outcomes[fault] for outcomes in faults[0]):
        assert found == kind, message
        assert all(word in message for word in words), message
        assert seconds < SECONDS
        assert names == ["step_0000001"], "nothing of the failed save is left, and the one before is"
    assert faults[0][0][fault][1] == faults[0][1][fault][1], "the same words on both ranks"


def test_the_saves_around_the_faults_are_whole(faults: Any) -> None:
    for outcomes in faults[0]:
        assert outcomes["before"][0] == outcomes["after"][0] == ""
        assert outcomes["after"][3] == ["step_0000001", "step_0000002"]
    tensors = []
    for step in (1, 2):
        path = faults[1] / "checkpoints" / f"step_{step:07d}"
        verify_hashes(path, open_manifest(path))
        tensors.append(read_tensors(path))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]), "nothing was trained between them"


def rank_snapshot(prepared: PreparedRun) -> None:
    """Save step 1 and wait; save it again slowly while two more steps are trained; save those."""
    drill = Drill(prepared)
    drill.trainer.train_step()
    drill.outcome(1)
    with replaced(shard_writer, "write_part", slow):
        drill.saver.start(drill.request(2))
    assert drill.saver.poll() is None, "it is still being written"
    drill.trainer.train_step()
    drill.trainer.train_step()
    assert drill.saver.finish() is not None
    drill.outcome(3)
    destroy_parallel()


@pytest.mark.parametrize("optimizer", ["distributed", "whole"])
def test_what_is_saved_is_the_moment_of_the_save(optimizer: str, run_config: Callable[..., RunConfig]) -> None:
    prepared = prepare_run(run_config(parallel={"use_distributed_optimizer": optimizer == "distributed"}), world_size=2)
    run_ranks(rank_snapshot, world_size=2, arguments=(prepared,))
    checkpoints = Path(prepared.config.output) / "checkpoints"
    waited, beside, later = (read_tensors(checkpoints / f"step_{step:07d}") for step in (1, 2, 3))
    assert all(torch.equal(waited[key], beside[key]) for key in waited)
    changed = [key for key in waited if not key.startswith("rng.") and not torch.equal(waited[key], later[key])]
    assert len(changed) > len(waited) / 2, "the training went on meanwhile: the comparison can fail"
    if optimizer == "distributed":
        written = [sum(path.stat().st_size for path in checkpoints.glob(f"*1/__{rank}_*.distcp")) for rank in (0, 1)]
        assert max(written) < 1.1 * min(written), "data-parallel ranks share the writing"
