"""Do tasks in worker processes and give the results in the order of the tasks, whatever the number of workers."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from megatron_xmtf.errors import RankFailedError

__all__ = ["WorkerPool", "one_tokenizer_thread"]

Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_PER_WORKER = 3
"""Tasks handed out ahead of the results taken: bounds the memory whatever the speeds."""
PARALLELISM_VARIABLE = "TOKENIZERS_PARALLELISM"
"""Read by `tokenizers` at every call; threads inside a worker would only compete with the other workers."""


class WorkerPool:
    """Processes that share a state; a context manager. With 1 worker everything happens in this process.

    with WorkerPool(2, state=settings, setup=Encoder) as pool:
        for result in pool.map(function, tasks):     # function(Encoder(settings), task)

    Args:  state: sent to each process once. setup: makes of it, once in each process, what the function gets; None:
           the state itself. Both functions stand in a module. max_ahead: tasks under way at most, however many workers.
           after_fork: processes are forked, which saves seconds of imports, and call it first; this process must not
           need locks of threads that a child inherits (tokenizers, OpenMP). None: they are spawned.
    """

    def __init__(
        self,
        workers: int,
        *,
        state: Any,
        setup: Callable[[Any], Any] | None = None,
        max_ahead: int | None = None,
        after_fork: Callable[[], None] | None = None,
    ) -> None:
        self.workers, self.state, self.setup, self.after_fork = workers, state, setup, after_fork
        self._ahead = min(TASKS_PER_WORKER * workers, max_ahead or TASKS_PER_WORKER * workers)
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        if self.workers > 1:
            # Spawned as a rule: a forked child inherits the locks of tokenizer threads and of the progress bar.
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=get_context("spawn" if self.after_fork is None else "fork"),
                initializer=_start_worker,
                initargs=(self.state, self.setup, self.after_fork),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """Yield the function's result for each task, in order; an error is raised where its task stands in the order.

        Raises:  RankFailedError: a worker process was killed. And what the function raises.
        """
        if self._executor is None:
            state = self.state if self.setup is None else self.setup(self.state)
            for task in tasks:
                with one_tokenizer_thread():
                    result = function(state, task)
                yield result
            return
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(self._executor.submit(_call, function, task))
                if len(pending) >= self._ahead:
                    yield _result(pending.popleft(), self._executor)
            while pending:
                yield _result(pending.popleft(), self._executor)
        except BrokenProcessPool as error:
            raise RankFailedError(
                f"one of {self.workers} worker processes was killed, most likely for want of memory; the file at hand "
                "was not written. Run again with fewer workers."
            ) from error


@contextmanager
def one_tokenizer_thread() -> Iterator[None]:
    """Keep `tokenizers` to one thread: one worker means one, and a later fork finds no threads of it."""
    before = os.environ.get(PARALLELISM_VARIABLE)
    os.environ[PARALLELISM_VARIABLE] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM_VARIABLE]
        else:
            os.environ[PARALLELISM_VARIABLE] = before


def _result(future: Future[Result], executor: ProcessPoolExecutor) -> Result:
    """Wait for a result, and see that the workers live meanwhile.

    A worker killed in the middle of sending leaves half a message, for whose rest the pool would wait for ever. With
    all workers gone and our own writing end closed the pool finds the end of the stream and breaks.
    """
    processes = list((executor._processes or {}).values())
    while not wait([future], timeout=1.0).done:
        if any(process.exitcode is not None for process in processes):
            for process in processes:
                process.kill()
            executor._result_queue._writer.close()  # type: ignore[attr-defined]
            raise BrokenProcessPool("a worker process ended while its result was waited for")
    return future.result()


class _Worker:
    """What the functions of a worker process get, set once at its start."""

    state: Any = None


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_Worker.state, task)


def _start_worker(state: Any, setup: Callable[[Any], Any] | None, after_fork: Callable[[], None] | None) -> None:
    """Prepare a worker: one thread, signals to stop left to the parent, and an end when the parent is killed."""
    os.environ[PARALLELISM_VARIABLE] = "false"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if after_fork is not None:
        after_fork()
    _Worker.state = state if setup is None else setup(state)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
