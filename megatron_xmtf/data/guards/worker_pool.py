"""Do tasks in worker processes and give the results in the order of the tasks, whatever the number of workers."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from megatron_xmtf.errors import RankFailedError

__all__ = ["WorkerPool"]

Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_PER_WORKER = 3
"""Tasks handed out ahead of the results taken: bounds the memory whatever the speeds."""
PARALLELISM_VARIABLE = "TOKENIZERS_PARALLELISM"
"""Read by `tokenizers` at every call; threads inside a worker would only compete with the other workers."""


class WorkerPool:
    """Processes that share a state; a context manager. With 1 worker everything happens in this process.

    with WorkerPool(2, state=index) as pool:
        for result in pool.map(function, tasks):     # function(index, task), a function of a module
            ...
    """

    def __init__(self, workers: int, *, state: Any) -> None:
        self.workers, self.state = workers, state
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        self._before = os.environ.get(PARALLELISM_VARIABLE)
        os.environ[PARALLELISM_VARIABLE] = "false"
        if self.workers > 1:
            # spawn: a forked child would inherit the locks of tokenizer threads and of the progress bar.
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(self.state,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        if self._before is None:
            del os.environ[PARALLELISM_VARIABLE]
        else:
            os.environ[PARALLELISM_VARIABLE] = self._before

    def map(self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """Yield function(state, task) for each task, in order.

        Raises:  RankFailedError: a worker process was killed. And what the function raises.
        """
        if self._executor is None:
            for task in tasks:
                yield function(self.state, task)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(self._executor.submit(_call, function, task))
                if len(pending) >= TASKS_PER_WORKER * self.workers:
                    yield _result(pending.popleft(), self._executor)
            while pending:
                yield _result(pending.popleft(), self._executor)
        except BrokenProcessPool as error:
            raise RankFailedError(
                f"one of {self.workers} worker processes was killed, most likely for want of memory; nothing was "
                "written. Run again with fewer workers."
            ) from error


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


_STATE: list[Any] = []
"""The state of a worker process, put there once when it starts."""


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_STATE[0], task)


def _start_worker(state: Any) -> None:
    """Prepare a worker: one thread, Ctrl-C left to the parent, and an end when the parent is killed."""
    _STATE.append(state)
    os.environ[PARALLELISM_VARIABLE] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
