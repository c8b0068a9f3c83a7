"""Say how to install the packages that only some formats need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_xmtf.errors import ConfigError

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(label: str, what: str) -> Iterator[None]:
    """Turn a failed import of pyarrow or datasets into a `ConfigError` with the command that installs them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("pyarrow", "datasets"):
            raise
        raise ConfigError(
            f"{label}: reading {what} needs the package {error.name}; pip install 'megatron_xmtf[datasets]'."
        ) from error
