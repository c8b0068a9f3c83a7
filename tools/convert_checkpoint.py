"""Megatron's `tools/checkpoint/convert.py`, spelled as there: calls `xmtf import` or `xmtf export`.

    python tools/convert_checkpoint.py --model-type GPT --loader hf --saver core \\
        --load-dir models/bloom-560m --save-dir checkpoints/bloom-560m
    python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf \\
        --load-dir runs/first --save-dir models/finetuned

    core    the sharded checkpoint of this project (torch_dist, by Megatron-Core)        hf    a Hugging Face directory

There are no `--target-tensor-parallel-size` and `--target-pipeline-parallel-size`: a checkpoint is the same at every
parallel layout, and the layout is chosen where it is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_xmtf.cli import main as xmtf


def main(words: Sequence[str] | None = None) -> int:
    """Translate and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", choices=["GPT"], default="GPT", help="Megatron's name for a decoder")
    parser.add_argument("--loader", choices=["hf", "core"], required=True)
    parser.add_argument("--saver", choices=["hf", "core"], required=True)
    parser.add_argument("--load-dir", required=True, metavar="DIR")
    parser.add_argument("--save-dir", required=True, metavar="DIR")
    dtype = parser.add_mutually_exclusive_group()
    for flag, name in (("--fp32", "float32"), ("--fp16", "float16"), ("--bf16", "bfloat16")):
        dtype.add_argument(flag, dest="dtype", action="store_const", const=name, help="type of the weights written")
    arguments = parser.parse_args(words)
    if arguments.loader == arguments.saver:
        parser.error(f"--loader and --saver are both {arguments.loader}: there is nothing to convert")
    verb, source = ("import", "--hf") if arguments.loader == "hf" else ("export", "--checkpoint")
    command = [verb, source, arguments.load_dir, "--output", arguments.save_dir]
    return xmtf(command + (["--dtype", arguments.dtype] if arguments.dtype else []))


if __name__ == "__main__":
    sys.exit(main())
