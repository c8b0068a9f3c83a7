"""`xmtf average`: several checkpoints of one model become one."""

from __future__ import annotations

import argparse

HELP = "average the weights of several checkpoints of one model"
EXAMPLE = (
    "  xmtf average --checkpoint runs/a --checkpoint runs/b --output averaged\n"
    "  xmtf average --checkpoint runs/a --checkpoint runs/b --weight 0.3 --weight 0.7 --output averaged\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        metavar="CKPT",
        help="checkpoint, or a run directory (its newest checkpoint); two or more",
    )
    parser.add_argument(
        "--weight", type=float, action="append", metavar="X", help="one a checkpoint, summing to 1; default: all equal"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="checkpoint to write; must not exist")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; default: as in the checkpoints")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: by the model's size and the cores"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew instead of going on where a killed average stopped"
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Average."""
    import json
    from dataclasses import asdict

    from megatron_xmtf.conversion.average import average_checkpoints
    from megatron_xmtf.conversion.huggingface_model import parse_dtype

    done = average_checkpoints(
        arguments.checkpoint,
        arguments.output,
        weights=arguments.weight,
        dtype=parse_dtype(arguments.dtype),
        workers=arguments.workers,
        restart=arguments.restart,
    )
    if arguments.json:
        print(json.dumps(asdict(done), indent=2, default=str))
    else:
        print(f"{done.checkpoint}: {done.tensors} tensors, {done.parameters:,} parameters, {done.dtype}")
        for path, weight in zip(done.sources, done.weights, strict=True):
            print(f"  {weight:g} x {path}")
    return 0
