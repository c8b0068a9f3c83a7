"""`xmtf export`: a checkpoint becomes a Hugging Face model."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "turn a checkpoint into a Hugging Face model that `transformers` opens, or into Megatron-DeepSpeed's layer files"
EXAMPLE = (
    "  xmtf export --checkpoint runs/bloomz --output bloomz-hf --dtype bfloat16\n"
    "  xmtf export --checkpoint runs/bloomz --output bloomz-megds --format deepspeed --tensor-parallel 4\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="checkpoint, or a run directory (its newest checkpoint)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; default: as in the checkpoint")
    parser.add_argument(
        "--format",
        choices=["hf", "deepspeed"],
        default="hf",
        help="hf (default): Hugging Face, safetensors; deepspeed: layer files of BigScience's Megatron-DeepSpeed",
    )
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="deepspeed: files of each layer, one a rank; default 1"
    )
    parser.add_argument(
        "--pipeline-parallel", type=int, metavar="N", help="deepspeed: stages, which the settings name; default 1"
    )
    parser.add_argument(
        "--allow-causal",
        action="store_true",
        help="write the weights of a model trained with batch.prefix_lm, whose inputs transformers reads causally",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: by the model's size and the cores"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew instead of going on where a killed export stopped"
    )
    parser.add_argument(
        "--no-verify-hashes",
        action="store_true",
        help="compare the checkpoint's files with their sizes alone; default: with their hashes",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    import json
    from dataclasses import asdict

    from megatron_xmtf.conversion.huggingface_model import parse_dtype
    from megatron_xmtf.errors import ConfigError

    dtype = parse_dtype(arguments.dtype)
    done: Any
    if arguments.format == "deepspeed":
        from megatron_xmtf.conversion.deepspeed_export import export_deepspeed

        done = export_deepspeed(
            arguments.checkpoint,
            arguments.output,
            tensor_parallel_size=1 if arguments.tensor_parallel is None else arguments.tensor_parallel,
            pipeline_parallel_size=1 if arguments.pipeline_parallel is None else arguments.pipeline_parallel,
            dtype=dtype,
            verify=not arguments.no_verify_hashes,
        )
    else:
        from megatron_xmtf.conversion.huggingface_export import export_huggingface

        if arguments.tensor_parallel is not None or arguments.pipeline_parallel is not None:
            raise ConfigError(
                "--tensor-parallel and --pipeline-parallel belong to --format deepspeed; a Hugging Face model is not "
                "cut for ranks."
            )
        done = export_huggingface(
            arguments.checkpoint,
            arguments.output,
            dtype=dtype,
            allow_causal=arguments.allow_causal,
            workers=arguments.workers,
            restart=arguments.restart,
            verify=not arguments.no_verify_hashes,
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
