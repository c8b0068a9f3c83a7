"""Read the next part in a thread while this one is used: the disk and the processor work at the same time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["read_ahead"]

Item = TypeVar("Item")
Part = TypeVar("Part")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Part]) -> Generator[tuple[Item, Part], None, None]:
    """Yield each item with what is read for it, one part ahead; an error is raised where its item stands.

    Memory: one part more. `read` runs in one thread, in the order of the items.
    """
    # A thread has its own number of OpenMP threads, and a forked process must start none.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        before = None
        for item in items:
            after = (item, pool.submit(read, item))
            if before is not None:
                yield before[0], before[1].result()
            before = after
        if before is not None:
            yield before[0], before[1].result()
