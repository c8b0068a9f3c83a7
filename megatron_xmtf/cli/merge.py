"""`xmtf merge`: concatenate datasets."""

from __future__ import annotations

import argparse

from megatron_xmtf.errors import ExitCode

HELP = "concatenate indexed datasets of the same tokenizer into one"

EXAMPLE = """\
  xmtf merge --input data/en data/sw data/yo --output-prefix data/all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xmtf merge`."""
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="P", help="prefixes of the datasets, in order"
    )
    parser.add_argument("--output-prefix", required=True, metavar="Q", help="prefix of the new dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset at Q when the new one is whole")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Merge and report."""
    from megatron_xmtf.data.merge import merge_datasets

    manifest = merge_datasets(arguments.input, output_prefix=arguments.output_prefix, overwrite=arguments.overwrite)
    if arguments.json:
        import json

        print(json.dumps(manifest, ensure_ascii=False))
    else:
        for source in manifest["merged_from"]:
            print(f"{source['num_examples']:>14,}  {source['prefix']}")
        missing = manifest["without_documents"]
        if missing:
            print(f"without documents, as {len(missing)} of the inputs are: {', '.join(missing)}")
        tokens = sum(manifest["tokens"].values())
        print(f"{manifest['num_examples']:>14,}  {arguments.output_prefix}   examples, {tokens:,} tokens")
    return int(ExitCode.DONE)
