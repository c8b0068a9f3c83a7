"""`xmtf import`: a Hugging Face model, or another program's checkpoint, becomes a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "turn a model of Hugging Face, Megatron-DeepSpeed or Megatron-Core into a checkpoint that any layout reads"
EXAMPLE = (
    "  xmtf import --hf bloom-560m --output checkpoints/bloom-560m\n"
    "  xmtf import --deepspeed bloom/global_step95000 --tokenizer bloom-hf --output checkpoints/bloom\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR", help="Hugging Face directory: config.json and weights")
    source.add_argument(
        "--deepspeed",
        metavar="DIR",
        help="checkpoint of BigScience's Megatron-DeepSpeed: layer files, universal, or its fragments; or the "
        "directory above, with `latest`",
    )
    source.add_argument(
        "--megatron",
        metavar="DIR",
        help="torch_dist checkpoint of Megatron-LM or Megatron-Core that holds a BLOOM; or the directory above",
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="checkpoint to write; must not exist")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; default: as in the model")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: by the model's size and the cores"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew instead of going on where a killed import stopped"
    )
    others = parser.add_argument_group("with --deepspeed or --megatron")
    others.add_argument("--config", metavar="PATH", help="a BLOOM's config.json; default: by the run's own settings")
    others.add_argument("--tokenizer", metavar="DIR", help="directory whose tokenizer files go along")
    others.add_argument("--vocab-size", type=int, metavar="N", help="rows of the embedding to keep; default: all")
    deepspeed = parser.add_argument_group("with --deepspeed")
    deepspeed.add_argument(
        "--weights",
        choices=["stored", "fp32"],
        help="stored (default): what the layer files hold; fp32: the optimizer's own weights, beside them",
    )
    deepspeed.add_argument(
        "--replicas",
        choices=["average", "first", "refuse"],
        help="copies that tensor-parallel ranks hold of one weight, where they differ: average (default, as the "
        "published models have), the first rank's, or an error",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Import."""
    import json
    from dataclasses import asdict

    from megatron_xmtf.conversion.huggingface_model import parse_dtype

    common: Any = {"dtype": parse_dtype(arguments.dtype), "workers": arguments.workers, "restart": arguments.restart}
    done: Any
    if arguments.deepspeed is not None:
        from megatron_xmtf.conversion.deepspeed import import_deepspeed

        done = import_deepspeed(
            arguments.deepspeed,
            arguments.output,
            config=arguments.config,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            weights=arguments.weights or "stored",
            replicas=arguments.replicas or "average",
            **common,
        )
    elif arguments.megatron is not None:
        from megatron_xmtf.conversion.megatron_core import import_megatron

        _refuse(arguments, "weights", "replicas")
        done = import_megatron(
            arguments.megatron,
            arguments.output,
            config=arguments.config,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            **common,
        )
    else:
        from megatron_xmtf.conversion.huggingface import import_huggingface

        _refuse(arguments, "config", "tokenizer", "vocab_size", "weights", "replicas")
        done = import_huggingface(arguments.hf, arguments.output, **common)
    if arguments.json:
        print(json.dumps(asdict(done), indent=2, default=str))
        return 0
    print(f"{done.checkpoint}: {done.tensors} tensors, {done.parameters:,} parameters, {done.dtype}")
    if arguments.deepspeed is not None:
        _print_deepspeed(done)
    if arguments.megatron is not None and done.dropped_vocabulary_rows:
        print(f"  {done.dropped_vocabulary_rows} rows of the embedding dropped")
    return 0


def _refuse(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse flags that this source has no use for.

    Raises:  ConfigError: one is given.
    """
    from megatron_xmtf.errors import ConfigError

    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: of no use with this source; xmtf import --help says where it belongs.")


def _print_deepspeed(done: Any) -> None:
    """Say what a reader of the model should know."""
    where = f"{done.source}, {done.read}, {done.tensor_parallel_size} tensor-parallel ranks"
    print(f"  from {where}" + (f", iteration {done.iteration:,}" if done.iteration is not None else ""))
    if done.differing_replicas:
        print(
            f"  {done.differing_replicas} weights that every rank holds had drifted apart, by up to "
            f"{done.max_replica_drift:.3g} ({done.worst_replica})"
        )
    if done.dropped_vocabulary_rows:
        print(f"  {done.dropped_vocabulary_rows} rows of the embedding dropped")
    for part in done.left_out:
        print(f"  not read: {part}")
