"""Start a run: prepare once, then train in local ranks of our own or as one rank of a launcher's job."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed

from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.errors import ConfigError, ExitCode, HangError, RankFailedError, RunLockedError, XmtfError
from megatron_xmtf.files import write_json
from megatron_xmtf.parallel.launch import is_of_lost_peer, joined_by_launcher, prepare_to_fork, run_ranks
from megatron_xmtf.parallel.stop_forwarding import StopForwarding
from megatron_xmtf.parallel.topology import rendezvous_store, world_size_from_environment
from megatron_xmtf.training.prepare import prepare_run
from megatron_xmtf.training.run_lock import LOCK_FILE, RunLock
from megatron_xmtf.training.trainer import TrainingResult, train_rank
from megatron_xmtf.training.watchdog import STACKS, describe_hang

__all__ = ["train"]

logger = logging.getLogger(__name__)

PREPARED = "xmtf/prepared"
DEPARTED = "xmtf/departed"
PREPARE_HOURS = 12
"""How long the other ranks wait for rank 0 to check the inputs and build the packing index, or to end an export."""
DEPART_SECONDS = 10.0
"""How long the other ranks wait for rank 0 to write what all of them raise."""


def train(config: RunConfig, *, nproc: int = 1, allowed_changes: Sequence[str] = ()) -> TrainingResult:
    """Train, and leave the outcome in `OUT/status.json` as well.

    Args:    nproc: local ranks to start, when no launcher (torchrun, srun) has started this process as one already.
             allowed_changes: keys that may differ from the resumed checkpoint's.
    Returns: the result, the same on every rank of a launcher's job.
    Raises:  what `prepare_run` and `train_rank` raise. HangError: a local rank made no progress. StoppedError: a
             signal came before the first step.
    """
    if not joined_by_launcher():
        return _train(config, nproc, allowed_changes, departure=None)
    if nproc > 1:
        raise ConfigError(
            f"--nproc {nproc} beside a launcher, which has started {os.environ['WORLD_SIZE']} ranks already: leave "
            "--nproc out, or start one process (srun --ntasks=1)."
        )
    with _Departure() as departure:
        return _train(config, nproc, allowed_changes, departure=departure)


def _train(
    config: RunConfig, nproc: int, allowed_changes: Sequence[str], *, departure: _Departure | None
) -> TrainingResult:
    """Train and write the status.

    Args:  departure: of a launcher's job; None: the ranks are started here.
    """
    lock = RunLock(config.output)
    try:
        return _train_locked(config, nproc, allowed_changes, departure=departure, lock=lock)
    finally:
        lock.release()


def _train_locked(
    config: RunConfig,
    nproc: int,
    allowed_changes: Sequence[str],
    *,
    departure: _Departure | None,
    lock: RunLock,
) -> TrainingResult:
    joined, started = departure is not None, time.time()
    is_first = departure is None or os.environ["RANK"] == "0"
    existed = Path(config.output).is_dir()
    try:
        if departure is None:
            result = _train_local(config, nproc, allowed_changes, lock)
        else:
            result = _train_joined(config, allowed_changes, departure, lock)
    except RunLockedError:
        raise  # what lies there is the status of the run that has the directory
    except XmtfError as error:
        if is_first or isinstance(error, RankFailedError):
            if joined and is_of_lost_peer(str(error)) and _has_status_since(config, started):
                raise  # the rank with the cause has said it
            _write_status(config, existed, error.exit_code, f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        # A defect, or Ctrl-C: the status of an earlier part of the run must not stand for this one.
        if is_first:
            _write_status(config, existed, ExitCode.FAILED, f"{type(error).__name__}: {error}")
        raise
    if is_first:
        done = f"step {result['last_step']} of {config.train_steps} done"
        stopped = f", stopped by {result['stopped_by']}" if result["stopped_by"] else ""
        steps = {"step": result["last_step"], "train_steps": config.train_steps}
        _write_status(config, existed, ExitCode(result["exit_code"]), done + stopped, **steps)
    return result


class _Departure:
    """Keeps the ranks of a launcher's job until rank 0 has said how the run ended; a context manager.

    srun and torchrun end the other ranks as soon as one leaves with an exit code, and 3 is one: rank 0 would die over
    its last checkpoint's name, an export or `OUT/status.json`.
    """

    def __init__(self) -> None:
        self.store: torch.distributed.Store | None = None
        """Where the ranks have met; None: they have not."""

    def __enter__(self) -> _Departure:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.store is None:
            return
        alone = error is not None and (not isinstance(error, XmtfError) or isinstance(error, RankFailedError))
        try:
            if os.environ["RANK"] == "0":
                self.store.set(DEPARTED, "")
            elif not alone:
                limit = timedelta(hours=PREPARE_HOURS) if error is None else timedelta(seconds=DEPART_SECONDS)
                self.store.wait([DEPARTED], limit)
        except RuntimeError as lost:
            logger.info("rank 0 is gone already: %s", str(lost).split("\n", 1)[0])


def _train_local(config: RunConfig, nproc: int, allowed_changes: Sequence[str], lock: RunLock) -> TrainingResult:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_to_fork()
    with StopForwarding(grace_seconds=60 * config.stop.grace_minutes) as stop:
        with stop.interrupting():
            lock.take()
            prepared = prepare_run(config, world_size=nproc, allowed_changes=allowed_changes)
        try:
            results: list[TrainingResult] = run_ranks(train_rank, world_size=nproc, arguments=(prepared,), stop=stop)
        except RankFailedError as error:
            if error.exit_code is not ExitCode.HANG:
                raise
            raise HangError(describe_hang(Path(config.output) / STACKS, nproc)) from None
    return results[0]


def _train_joined(
    config: RunConfig, allowed_changes: Sequence[str], departure: _Departure, lock: RunLock
) -> TrainingResult:
    """Be one rank of a launcher's job: rank 0 prepares while the others wait for its word in the store.

    They wait outside any collective, so that a long index build runs into no collective's timeout.
    """
    rank, world_size = int(os.environ["RANK"]), world_size_from_environment()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format=f"[rank {rank}] %(message)s")
    store = rendezvous_store(timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes))
    departure.store = store
    if rank == 0:
        try:
            lock.take()
            prepared = prepare_run(config, world_size=world_size, allowed_changes=allowed_changes)
        except Exception as error:  # whatever it is, the others must not wait for hours
            store.set(PREPARED, json.dumps([int(_exit_code(error)), f"{type(error).__name__}: {error}", None]))
            raise
        store.set(PREPARED, json.dumps([0, "", prepared.packing_key]))
    else:
        store.wait([PREPARED], timedelta(hours=PREPARE_HOURS))
        code, message, packing_key = json.loads(store.get(PREPARED))
        locked = f"{RunLockedError.__name__}: "
        if message.startswith(locked):
            raise RunLockedError(message.removeprefix(locked))
        if code:
            raise RankFailedError(f"rank 0 could not prepare the run: {message}", ExitCode(code))
        prepared = prepare_run(config, world_size=world_size, allowed_changes=allowed_changes, packing_key=packing_key)
    try:
        return train_rank(prepared, store)
    except RankFailedError as error:
        if is_of_lost_peer(str(error)):
            raise RankFailedError(f"lost a peer, whose own error is the cause: {error}", error.exit_code) from None
        # No launcher of ours is there to show it.
        raise RankFailedError(f"{error}\n{traceback.format_exc()}", error.exit_code) from None


def _exit_code(error: Exception) -> ExitCode:
    return error.exit_code if isinstance(error, XmtfError) else ExitCode.FAILED


def _has_status_since(config: RunConfig, started: float) -> bool:
    path = Path(config.output) / "status.json"
    return path.is_file() and path.stat().st_mtime >= started


def _write_status(config: RunConfig, existed: bool, code: ExitCode, message: str, **steps: int) -> None:
    """Write `OUT/status.json`; launchers often collapse the exit codes of their workers.

    Args:  existed: whether the directory was there before this start, so that the status may be all there is in it.
           steps: `step`, the last one done, and `train_steps`, of a run that ended by itself.
    """
    output = Path(config.output)
    # A refused start leaves no run directory behind: the lock alone goes again.
    if output.is_dir() and (existed or any(path.name != LOCK_FILE for path in output.iterdir())):
        status = {"exit_code": int(code), "name": code.name, "message": message, **steps}
        try:
            write_json(output / "status.json", status)
        except OSError as error:  # a full disk must not hide how the run ended
            logger.warning("%s could not be written: %s", output / "status.json", error)
