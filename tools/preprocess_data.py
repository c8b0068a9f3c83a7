"""Megatron's `tools/preprocess_data.py`, spelled as there: translates its flags and calls `xmtf preprocess`.

    python tools/preprocess_data.py --input train.jsonl --json-keys inputs targets --append-eod --prepend-space \\
        --tokenizer-type PretrainedFromHF --tokenizer-name-or-path models/bloom-560m --output-prefix data/train

    Megatron                                     xmtf preprocess
    --json-keys inputs targets                   --kind pairs (other names: --field-map inputs=… targets=…)
    --json-keys text                             --kind text (another name: --field-map text=…)
    --append-eod                                 always: targets and documents end with the end-of-sequence token
    --prepend-space                              --target-prefix " " (left out: --target-prefix "")
    --tokenizer-name-or-path, --tokenizer-model  --tokenizer

Megatron reads the file once for the inputs and once for the targets; here both come from one pass, so that they cannot
fall out of step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_xmtf.cli import main as xmtf

TOKENIZER_TYPES = ("PretrainedFromHF", "HuggingFaceTokenizer")


def build_parser() -> argparse.ArgumentParser:
    """Declare Megatron's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, nargs="+", metavar="F", help=".jsonl or .jsonl.gz")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one key, or inputs targets")
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0])
    parser.add_argument("--tokenizer-name-or-path", "--tokenizer-model", required=True, metavar="DIR")
    parser.add_argument("--append-eod", action="store_true", help="required: it is always done")
    parser.add_argument("--prepend-space", action="store_true", help="put a space before every target")
    parser.add_argument("--dataset-impl", choices=["mmap"], default="mmap")
    parser.add_argument("--workers", type=int, default=1)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Translate and call."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    keys = arguments.json_keys
    if len(keys) > 2 or keys in (["inputs"], ["targets"]):
        parser.error("--json-keys takes the keys of inputs and targets together (one pass makes both), or one of texts")
    if not arguments.append_eod:
        parser.error("targets and documents always end with the end-of-sequence token here: say --append-eod")
    if len(keys) == 1 and arguments.prepend_space:
        parser.error("--prepend-space is for targets: give --json-keys inputs targets")
    fields = ["inputs", "targets"] if len(keys) == 2 else ["text"]
    command = ["preprocess", "--input", *arguments.input, "--output-prefix", arguments.output_prefix]
    command += ["--tokenizer", arguments.tokenizer_name_or_path, "--workers", str(arguments.workers)]
    command += ["--kind", "pairs" if len(keys) == 2 else "text"]
    if keys != fields:
        command += ["--field-map", *(f"{field}={key}" for field, key in zip(fields, keys, strict=True))]
    if len(keys) == 2:
        command += ["--target-prefix", " " if arguments.prepend_space else ""]
    return xmtf(command)


if __name__ == "__main__":
    sys.exit(main())
