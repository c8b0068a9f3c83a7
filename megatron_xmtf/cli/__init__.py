"""The `xmtf` command: one verb a file, each parses, calls and prints; no logic lives here.

A verb module has `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(arguments) -> int`, and imports
nothing heavy at its top, so that every `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence

from megatron_xmtf import __version__
from megatron_xmtf.errors import ExitCode, XmtfError

__all__ = ["build_parser", "main", "parse"]

VERBS: dict[str, str] = {
    # verb: module of this package
    "quickstart": "quickstart",
    "render": "render",
    "preprocess": "preprocess",
    "merge": "merge",
    "pack": "pack",
    "plan": "plan",
    "import": "import_checkpoint",
    "train": "train",
    "submit": "submit",
    "evaluate": "evaluate",
    "generate": "generate",
    "average": "average",
    "export": "export_checkpoint",
    "verify": "verify",
    "inspect": "inspect_path",
    "doctor": "doctor",
}
"""Verb -> module of this package, in the order of the data flow."""

DISK_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EREMOTEIO)
"""What a disk that is full, failing or gone says: no defect of ours, so no traceback."""

EXIT_CODES = """exit codes:
  0 done   1 failed   2 the user's mistake   3 requeue   4 config mismatch   5 corrupt checkpoint
  6 hang   7 non-finite   8 disk full"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="xmtf",
        description="Prompted examples in, a finetuned multilingual model in the Hugging Face format out.",
        epilog=f"first steps:\n  xmtf quickstart --output quickstart_output\n  xmtf VERB --help\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron_xmtf {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module_name in VERBS.items():
        module = importlib.import_module(f"megatron_xmtf.cli.{module_name}")
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n{module.EXAMPLE.rstrip()}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; `key=value` overrides may stand before and after options.

    argparse gives positional arguments to one place only: those behind an option come back as unknown. What stands
    behind `--` in a command of `submit` is another command, `parsed.command`.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = None
    if words[:1] == ["submit"] and "--" in words:
        place = words.index("--")
        words, command = words[:place], words[place + 1 :]
    parsed, rest = parser.parse_known_args(words)
    parsed.command = command
    if rest:
        # `overrides` of train, the words behind CONFIG of pack and evaluate; a verb without them takes no more words.
        given = getattr(parsed, "overrides", None) or getattr(parsed, "config", None)
        takes_overrides = hasattr(parsed, "overrides") or isinstance(given, list)
        flags = [word for word in rest if word.startswith("-")]
        if flags or not takes_overrides:
            parser.error(f"{parsed.verb} does not know {' '.join(flags or rest)}; see xmtf {parsed.verb} --help")
        if hasattr(parsed, "overrides"):
            parsed.overrides = [*parsed.overrides, *rest]
        else:
            parsed.config = [*(parsed.config or []), *rest]
    return parsed


def _quieten_megatron_core() -> None:
    """Drop Megatron-Core's warnings of absent NVIDIA packages and of torch functions that it will leave some day.

    `xmtf doctor` reports what is missing, once.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core").setLevel(logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code; user mistakes print one message, no traceback."""
    parsed = parse(arguments)
    _quieten_megatron_core()
    try:
        return int(parsed.run(parsed))
    except XmtfError as error:
        print(f"xmtf {parsed.verb}: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print(f"xmtf {parsed.verb}: interrupted", file=sys.stderr)
        return int(ExitCode.FAILED)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        if error.filename is None:
            traceback.print_exc()
            return int(ExitCode.FAILED)
        print(
            f"xmtf {parsed.verb}: {error.filename}: {error.strerror}; name another path, or mend it.", file=sys.stderr
        )
        return int(ExitCode.USER)
    except BrokenPipeError:
        # The reader (head, less) went away; Python would complain again at shutdown when flushing.
        sys.stderr.close()
        return int(ExitCode.FAILED)
    except OSError as error:
        if error.errno not in DISK_REFUSALS:
            traceback.print_exc()
            return int(ExitCode.FAILED)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left; free some" if is_full else "the file system or its disk is failing; mend it"
        print(
            f"xmtf {parsed.verb}: {error}: {what}, and start the same command again. What has its final name is whole.",
            file=sys.stderr,
        )
        return int(ExitCode.DISK_FULL if is_full else ExitCode.FAILED)
    except Exception:
        traceback.print_exc()
        return int(ExitCode.FAILED)
