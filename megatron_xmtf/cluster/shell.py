"""Text for a shell: quoted, or refused.

a path of runs/it's $(here)   ->   'runs/it'"'"'s $(here)'
a path with a newline         ->   ConfigError
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from megatron_xmtf.errors import ConfigError

__all__ = ["Shell", "join", "quote", "slug"]

CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]")


class Shell(str):
    """Text that is shell already: quoted by this module, or the user's own lines."""

    __slots__ = ()


def quote(text: str) -> Shell:
    """Quote one word for a POSIX shell.

    Raises:  ConfigError: a newline or another control character, which no job script should carry.
    """
    found = CONTROL.search(text)
    if found is not None:
        raise ConfigError(
            f"{text!r} holds the control character {found.group()!r}, which a job script cannot carry; rename it."
        )
    return Shell(shlex.quote(text))


def join(words: Iterable[str]) -> Shell:
    """Quote words and join them with spaces."""
    return Shell(" ".join(quote(word) for word in words))


def slug(text: str) -> str:
    """Return a name of letters that need no quoting anywhere: "my run/é" -> "my_run"."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).strip("_.-+")[:60] or "run"
