"""Megatron's `tools/merge_datasets.py`, spelled as there: names the datasets of a directory and calls `xmtf merge`.

    python tools/merge_datasets.py --input data/languages --output-prefix data/all            Megatron-LM
    python tools/merge_datasets.py --datasets data/en data/sw --output-prefix data/all        Megatron-DeepSpeed

A dataset of inputs and targets is one dataset here: both halves are merged, in the same order.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_xmtf.cli import main as xmtf

ENDING = re.compile(r"_(inputs|targets|text)_document\.idx$")


def main(words: Sequence[str] | None = None) -> int:
    """Translate and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="DIR", help="directory: all its datasets, by name")
    source.add_argument("--datasets", nargs="+", metavar="P", help="prefixes, in order")
    parser.add_argument("--output-prefix", required=True, metavar="Q")
    arguments = parser.parse_args(words)
    prefixes = arguments.datasets
    if arguments.input:
        prefixes = sorted({ENDING.sub("", str(path)) for path in Path(arguments.input).glob("*_document.idx")})
        if not prefixes:
            parser.error(f"--input {arguments.input}: no dataset (*_document.idx) in this directory")
    return xmtf(["merge", "--input", *prefixes, "--output-prefix", arguments.output_prefix])


if __name__ == "__main__":
    sys.exit(main())
