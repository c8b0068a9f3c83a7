"""`xmtf import`: a Hugging Face model becomes a checkpoint."""

from __future__ import annotations

import argparse

HELP = "turn a Hugging Face model into a checkpoint that any parallel layout reads"
EXAMPLE = "  xmtf import --hf bloom-560m --output checkpoints/bloom-560m\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face directory: config.json and weights")
    parser.add_argument("--output", required=True, metavar="CKPT", help="checkpoint to write; must not exist")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; default: as in the model")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Import."""
    import json
    from dataclasses import asdict

    from megatron_xmtf.conversion.huggingface import import_huggingface
    from megatron_xmtf.conversion.huggingface_model import parse_dtype

    done = import_huggingface(arguments.hf, arguments.output, dtype=parse_dtype(arguments.dtype))
    if arguments.json:
        print(json.dumps({**asdict(done), "checkpoint": str(done.checkpoint)}, indent=2))
    else:
        print(f"{done.checkpoint}: {done.tensors} tensors, {done.parameters:,} parameters, {done.dtype}")
    return 0
