"""Read the next part in a thread while this one is used: the disk and the processor work at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["read_ahead"]

Item = TypeVar("Item")
Part = TypeVar("Part")


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Part], *, ahead: int = 2
) -> Generator[tuple[Item, Part], None, None]:
    """Yield each item with what is read for it; an error is raised where its item stands.

    Memory: `ahead` parts more. `read` runs in one thread, in the order of the items.
    """
    # A thread has its own number of OpenMP threads, and a forked process must start none.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        pending: deque[tuple[Item, Future[Part]]] = deque()
        for item in items:
            pending.append((item, pool.submit(read, item)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
