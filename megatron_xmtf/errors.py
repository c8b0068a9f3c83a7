"""Errors by audience, and the exit code that each one ends a process with.

    exit code   name               meaning
    0           done
    1           failed             a defect or an outside failure; the traceback is shown
    2           user's mistake     one message: what, values, rule, remedy
    3           requeue            stopped on a signal or time limit with a checkpoint; start again
    4           config mismatch    a resumed run whose configuration changed without --allow-change
    5           corrupt checkpoint a checkpoint that is not whole, or not what its manifest says
    6           hang               a rank made no progress for longer than the limit
    7           non-finite         NaN or Inf in loss or gradient
    8           disk full          a write failed for want of space

Every error that a user can cause is an `XmtfError`. Broken internal invariants are `assert`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "ConfigError",
    "ConfigMismatchError",
    "CorruptCheckpointError",
    "DatasetError",
    "DiskFullError",
    "ExitCode",
    "HangError",
    "MissingError",
    "NonFiniteError",
    "RankFailedError",
    "RecordError",
    "ReplicaDriftError",
    "RunLockedError",
    "StoppedError",
    "TemplateError",
    "TokenizerError",
    "XmtfError",
    "nearest_names",
]


class ExitCode(IntEnum):
    """Process exit codes; the table is in the module docstring and in the README."""

    DONE = 0
    FAILED = 1
    USER = 2
    REQUEUE = 3
    CONFIG_MISMATCH = 4
    CORRUPT_CHECKPOINT = 5
    HANG = 6
    NON_FINITE = 7
    DISK_FULL = 8


class XmtfError(Exception):
    """Anything a user can cause and mend. The message says what, the values, the rule, the way out."""

    exit_code: ExitCode = ExitCode.USER


class ConfigError(XmtfError, ValueError):
    """A configuration, override or command line that cannot be run as it stands."""


class ConfigMismatchError(ConfigError):
    """A resumed run whose configuration differs from the checkpoint's."""

    exit_code = ExitCode.CONFIG_MISMATCH


class MissingError(XmtfError, FileNotFoundError):
    """A file or directory that the user named does not exist."""


class RunLockedError(XmtfError, BlockingIOError):
    """A run directory that another run, which lives, writes in."""


class RecordError(XmtfError, ValueError):
    """An input record that cannot be read (malformed JSON, missing field, invalid UTF-8)."""


class TemplateError(XmtfError, ValueError):
    """A prompt template that cannot be read, or tries what templates may not do."""


class TokenizerError(XmtfError, ValueError):
    """A tokenizer that cannot be loaded, or is not the one that made the data or the model."""


class DatasetError(XmtfError, ValueError):
    """An indexed dataset or packing index that is missing, truncated, altered or inconsistent."""


class CheckpointError(XmtfError, ValueError):
    """A checkpoint or model directory that cannot be used as asked."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written: a writer died, hung, or was refused by the file system."""

    exit_code = ExitCode.FAILED


class CorruptCheckpointError(CheckpointError):
    """A checkpoint that is incomplete, altered, or holds something that may not be read."""

    exit_code = ExitCode.CORRUPT_CHECKPOINT


class HangError(XmtfError, TimeoutError):
    """A rank made no progress for longer than its phase may take; names rank, host, step and phase."""

    exit_code = ExitCode.HANG


class StoppedError(XmtfError, RuntimeError):
    """A run that a signal stopped before it had begun; the same command goes on."""

    exit_code = ExitCode.REQUEUE


class NonFiniteError(XmtfError, ArithmeticError):
    """NaN or Inf where a finite number is needed."""

    exit_code = ExitCode.NON_FINITE


class ReplicaDriftError(XmtfError, ArithmeticError):
    """Ranks that hold copies of one parameter no longer hold the same one."""

    exit_code = ExitCode.FAILED


class DiskFullError(XmtfError, OSError):
    """No space left for a file that must be written."""

    exit_code = ExitCode.DISK_FULL


class RankFailedError(XmtfError, RuntimeError):
    """A local rank ended abnormally; carries that rank's own exit code."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Word a hint that names the known spellings nearest to `name`.

    >>> nearest_names("micro_batchsize", ["micro_batch_size", "seed"])
    'nearest: micro_batch_size'
    """
    options = sorted(set(known))
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    return ("nearest: " if close else "known: ") + ", ".join(close or options)
