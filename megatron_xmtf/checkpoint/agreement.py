"""Let all ranks come to one end: what fails on one rank is raised on every rank, at once, with its cause.

A rank that raises alone leaves the others in a collective until its timeout, and what they say then is noise. So a
step that may fail is caught on the rank where it fails, the causes are exchanged, and all raise the same error.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed

from megatron_xmtf.errors import CheckpointWriteError, DiskFullError

__all__ = ["Failure", "from_rank_zero", "gather", "has_lost_contact", "raise_write_failures", "together"]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Failure:
    """Why a rank could not write."""

    message: str
    errno: int | None = None
    """Of the operating system, where it was an `OSError`."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Put an exception into words that survive the way between processes."""
        if isinstance(error, DiskFullError):
            return cls(str(error), errno.ENOSPC)
        if isinstance(error, OSError):
            return cls(str(error) or type(error).__name__, error.errno)
        return cls(f"{type(error).__name__}: {error}")


def from_rank_zero(function: Callable[[], Any]) -> Any:
    """Run `function` on rank 0 and hand its result, or its error, to all ranks."""
    holder: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            holder[0] = function()
        except Exception as error:  # whatever it is, it is raised on every rank; the others must not wait for it
            holder[1] = error
    torch.distributed.broadcast_object_list(holder, src=0)
    if holder[1] is not None:
        raise holder[1]
    return holder[0]


def together(function: Callable[[], Any]) -> Any:
    """Run `function`, which uses no collectives, on every rank; return this rank's result if all could.

    Raises:  what the lowest rank raised that failed, on every rank.
    """
    result, failed = None, None
    try:
        result = function()
    except Exception as error:  # raised below, on all ranks
        failed = error
    for cause in gather(failed):
        if cause is not None:
            raise cause
    return result


def gather(value: Any) -> list[Any]:
    """Return every rank's `value`, in the order of ranks, on all of them."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def has_lost_contact(error: BaseException) -> bool:
    """Return whether another rank went away while this one exchanged something: nothing is wrong with what it read.

    Gloo has no class for it: a bare RuntimeError names the source file of its transport.
    """
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def raise_write_failures(failures: Mapping[int, Failure], what: str) -> None:
    """Raise one error for the ranks that could not write; nothing happens if there are none.

    Args:    failures: rank -> cause, the same on every rank. what: names the checkpoint.
    Raises:  DiskFullError: no space or no quota left, or a limit of file sizes. CheckpointWriteError: any other cause.
    """
    if not failures:
        return
    named = "; ".join(f"rank {rank}: {failure.message}" for rank, failure in sorted(failures.items())[:3])
    more = f" and {len(failures) - 3} ranks more" if len(failures) > 3 else ""
    message = f"{what} could not be written: {named}{more}. Nothing of it is left, and those before it are untouched."
    if any(failure.errno in NO_SPACE for failure in failures.values()):
        raise DiskFullError(f"{message} Free space, or keep fewer (checkpoint.keep_last, keep_every), and resume.")
    raise CheckpointWriteError(f"{message} Mend the cause and start the same command again: it resumes.")
