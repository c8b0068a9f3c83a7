"""Start local ranks by forking after one import, watch them, and end together.

Importing torch and Megatron-Core takes seconds; forked ranks share one import. A rank that fails ends the others
within `GRACE_SECONDS`, and its error, not the noise of the ones that waited for it, is what the caller sees.

OpenMP's threads do not survive a fork: a process that will start ranks calls `prepare_to_fork` before any torch work.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_xmtf import errors
from megatron_xmtf.errors import ConfigError, ExitCode, RankFailedError, XmtfError
from megatron_xmtf.parallel.slurm_step import adopt_slurm_step
from megatron_xmtf.parallel.stop_forwarding import StopForwarding

__all__ = ["is_of_lost_peer", "joined_by_launcher", "prepare_to_fork", "run_ranks"]

GRACE_SECONDS = 5.0
"""How long the other ranks may take to end by themselves after one has failed."""
POLL_SECONDS = 0.5
"""How often a launcher that forwards signals looks whether one came."""


def joined_by_launcher() -> bool:
    """Whether torchrun, srun or another launcher started this process as one rank; a task of srun learns which."""
    adopt_slurm_step()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare_to_fork() -> None:
    """Keep torch's work in this process on one thread and off the GPU, so that ranks can be forked from it later.

    A forked rank that enters a parallel region after its parent has started OpenMP's threads waits forever. One whose
    parent has asked CUDA for its devices cannot use them: torch.cuda.is_available() is to ask the driver's library.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    torch.set_num_threads(1)


def run_ranks(
    function: Callable[..., Any], *, world_size: int, arguments: Sequence[Any] = (), stop: StopForwarding | None = None
) -> list[Any]:
    """Run `function(*arguments)` in `world_size` local processes and return what each rank returned.

    Every rank finds RANK, LOCAL_RANK and WORLD_SIZE in its environment and a rendezvous file of its own run.
    Torch gets (cores / world_size) threads a rank.

    Args:    function: called in every rank; its result is pickled back. world_size: ranks, at least 1.
             stop: forwards signals to the ranks, whose function has to unblock them; None: signals end this process.
    Raises:  XmtfError: of the same class that a rank raised. RankFailedError: a rank died or raised another error;
             names rank and cause, carries the rank's traceback.
    """
    if world_size < 1:
        raise ConfigError(f"nproc={world_size}: at least one rank is needed.")
    prepare_to_fork()
    _import_engine()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="xmtf-ranks-") as directory:
        rendezvous = str(Path(directory) / "rendezvous")
        ranks: list[tuple[BaseProcess, Connection]] = []
        processes: list[BaseProcess] = []
        try:
            with nullcontext() if stop is None else stop.starting(processes):
                for rank in range(world_size):
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_rank_main,
                        args=(function, tuple(arguments), rank, world_size, rendezvous, sender),
                        name=f"rank{rank}",
                    )
                    process.start()
                    sender.close()
                    processes.append(process)
                    ranks.append((process, receiver))
            return _collect(ranks, stop)
        finally:
            _end_all(processes)


def _import_engine() -> None:
    """Import what every rank needs once, before forking."""
    import warnings

    import torch

    with warnings.catch_warnings():
        # Megatron-Core says at import that optional packages are absent; `xmtf doctor` reports them in one place.
        warnings.simplefilter("ignore")
        import megatron_xmtf.parallel.topology

    assert not torch.cuda.is_initialized(), "ranks cannot be forked after CUDA is in use in this process"
    assert megatron_xmtf.parallel.topology is not None


def _rank_main(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    rendezvous: str,
    sender: Connection,
) -> None:
    """Run in the child: set the environment, call, send the result or the error."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C and ends the ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if rank:
        # Layout and kernels are the same on all ranks: rank 0 says them, once.
        logging.getLogger().setLevel(max(logging.WARNING, logging.getLogger().level))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), XMTF_RENDEZVOUS_FILE=rendezvous)
    if not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name often does not resolve
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    try:
        outcome: tuple[str, Any] = ("result", function(*arguments))
        payload = pickle.dumps(outcome)
    except BaseException as error:
        code = error.exit_code if isinstance(error, XmtfError) else ExitCode.FAILED
        payload = pickle.dumps(("error", (type(error).__name__, str(error), int(code), traceback.format_exc())))
    sender.send_bytes(payload)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    _destroy_process_group()
    # Leave without the parent's exit handlers and without waiting for gloo's threads.
    os._exit(0)


def _end_with_parent() -> None:
    """End this rank when its parent is gone, however it went: nobody else would ever stop it.

    Ranks hold the sentinels of those forked before them, so they end one after the other, the last one first.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is a child"
    parent.join()
    os._exit(int(ExitCode.FAILED))


def _destroy_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        try:
            torch.distributed.destroy_process_group()
        except RuntimeError:
            # The peers of a failed rank may be gone; the error that matters has been sent already.
            return


def _collect(ranks: list[tuple[BaseProcess, Connection]], stop: StopForwarding | None) -> list[Any]:
    """Wait for every rank's message; on the first failure wait a moment for a better cause, then raise it."""
    results: dict[int, Any] = {}
    failures: dict[int, tuple[str, str, int, str]] = {}
    deadline: float | None = None
    pending = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while pending:
        stopping = None if stop is None else stop.deadline
        limit = min((moment for moment in (deadline, stopping) if moment is not None), default=None)
        remaining = None if limit is None else max(0.0, limit - time.monotonic())
        # A signal changes the limit and does not wake `wait`.
        timeout = remaining if stop is None else min(POLL_SECONDS, POLL_SECONDS if remaining is None else remaining)
        ready = wait(list(pending), timeout)
        if not ready:
            if limit is not None and time.monotonic() >= limit:
                break
            continue
        for receiver in ready:
            assert isinstance(receiver, Connection), "only connections are waited for"
            rank = pending.pop(receiver)
            kind, value = _receive(receiver, ranks[rank][0])
            if kind == "result":
                results[rank] = value
            else:
                failures[rank] = value
                deadline = deadline or time.monotonic() + GRACE_SECONDS
    if failures:
        _raise_cause(failures)
    if pending:
        assert stop is not None and stop.first is not None, "ranks are left alone after a signal only"
        raise RankFailedError(
            f"{stop.first.name}: ranks {', '.join(map(str, sorted(pending.values())))} had not ended "
            f"({stop.grace_seconds:g} s, or a second SIGTERM) and were killed. Checkpoints that have their name are "
            "whole: the same command resumes from the newest."
        )
    return [results[rank] for rank in range(len(ranks))]


def _receive(receiver: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        outcome: tuple[str, Any] = pickle.loads(receiver.recv_bytes())
        return outcome
    except EOFError:
        process.join(GRACE_SECONDS)
        code = process.exitcode
        cause = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        hung = code == ExitCode.HANG  # a rank's watchdog leaves so, and has said why
        return "error", ("RankDied", f"ended without a word ({cause})", code if hung else int(ExitCode.FAILED), "")


def _raise_cause(failures: dict[int, tuple[str, str, int, str]]) -> None:
    """Raise the failure that explains the others: a user error, then a death, then the first other error.

    Args:  failures: by rank, in the order in which they came; what only says that a peer is gone comes last.
    """

    def weight(rank: int) -> int:
        name, message, _, _ = failures[rank]
        if isinstance(getattr(errors, name, None), type) and name != "RankFailedError":
            return 0
        if name == "RankDied":
            return 1
        return 3 if is_of_lost_peer(message) else 2

    rank = min(failures, key=weight)
    name, message, code, trace = failures[rank]
    error_class = getattr(errors, name, None)
    if isinstance(error_class, type) and issubclass(error_class, XmtfError) and error_class is not RankFailedError:
        raise error_class(message)
    what = message if name == "RankFailedError" else f"{name}: {message}"
    others = [
        f"rank {other}: {failures[other][1].splitlines()[0][:160] if failures[other][1] else failures[other][0]}"
        for other in failures
        if other != rank
    ]
    after = "".join(f"\nafter it, {line}" for line in others[:3])
    more = f"\nand {len(others) - 3} ranks more" if len(others) > 3 else ""
    detail = f"\n{trace}" if trace else ""
    raise RankFailedError(f"rank {rank} failed: {what}{detail}{after}{more}", ExitCode(code))


def is_of_lost_peer(message: str) -> bool:
    """Whether an error only says that another rank is gone, whose own error is the cause."""
    return any(word in message for word in ("Connection", "gloo", "NCCL"))


def _end_all(processes: list[BaseProcess]) -> None:
    """Join what has ended and kill the rest: a rank takes SIGTERM for the wish that it save."""
    for process in processes:
        process.join(0.5 if process.exitcode is None else 0)
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
