"""`xmtf export`: a checkpoint becomes a Hugging Face model."""

from __future__ import annotations

import argparse

HELP = "turn a checkpoint into a Hugging Face model that `transformers` opens"
EXAMPLE = "  xmtf export --checkpoint runs/bloomz --output bloomz-hf --dtype bfloat16\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="checkpoint, or a run directory (its newest checkpoint)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; default: as in the checkpoint")
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: Hugging Face, safetensors")
    parser.add_argument(
        "--allow-causal",
        action="store_true",
        help="write the weights of a model trained with batch.prefix_lm, whose inputs transformers reads causally",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    import json
    from dataclasses import asdict

    from megatron_xmtf.conversion.huggingface_export import export_huggingface
    from megatron_xmtf.conversion.huggingface_model import parse_dtype

    done = export_huggingface(
        arguments.checkpoint,
        arguments.output,
        dtype=parse_dtype(arguments.dtype),
        allow_causal=arguments.allow_causal,
    )
    if arguments.json:
        paths = {"directory": str(done.directory), "checkpoint": str(done.checkpoint)}
        print(json.dumps({**asdict(done), **paths}, indent=2))
    else:
        print(
            f"{done.directory}: step {done.step} of {done.checkpoint}, {done.tensors} tensors, "
            f"{done.parameters:,} parameters, {done.dtype}"
        )
    return 0
