"""`xmtf verify`: is this checkpoint the same model as that Hugging Face directory?"""

from __future__ import annotations

import argparse

HELP = "compare a checkpoint with a Hugging Face model: weights bit by bit, then logits"
EXAMPLE = (
    "  xmtf verify --checkpoint checkpoints/bloom-560m --hf bloom-560m\n"
    "  xmtf verify --checkpoint runs/bloomz --hf bloomz-hf --tensor-model-parallel-size 2 --json\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="checkpoint, or a run directory (its newest checkpoint)"
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--weights-only", action="store_true", help="leave the logits out: no model is built")
    parser.add_argument("--nproc", type=int, metavar="N", help="local ranks (default: tp x pp)")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference of a logit, times the logits' standard deviation where that is over 1; default 1e-4",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 if anything differs."""
    import json
    from dataclasses import asdict

    from megatron_xmtf.checkpoint.directory import find_checkpoint
    from megatron_xmtf.config import ParallelConfig, config_from_mapping
    from megatron_xmtf.conversion.verify import compare_weights
    from megatron_xmtf.conversion.verify_logits import compare_logits
    from megatron_xmtf.errors import ConfigError, ExitCode
    from megatron_xmtf.parallel.launch import joined_by_launcher, prepare_to_fork

    if joined_by_launcher():
        raise ConfigError("verify starts its own ranks (--nproc); run it without torchrun or srun.")
    # Weights are compared in this process, and ranks forked from it afterwards would wait for its threads for ever.
    prepare_to_fork()
    sizes = {
        "tensor_model_parallel_size": arguments.tensor_model_parallel_size,
        "pipeline_model_parallel_size": arguments.pipeline_model_parallel_size,
    }
    parallel = config_from_mapping(sizes, ParallelConfig, source="command line")
    checkpoint = find_checkpoint(arguments.checkpoint)
    weights = compare_weights(checkpoint, arguments.hf)
    same = weights.identical
    result = {"checkpoint": str(checkpoint), "hf": arguments.hf, "weights": asdict(weights), "logits": None}
    lines = [
        f"weights: {weights.tensors - len(weights.differing)} of {weights.tensors} tensors bit-identical "
        f"(checkpoint {weights.checkpoint_dtype}, hf {weights.hf_dtype})"
    ]
    lines += [f"  {tensor.name}: max |difference| {tensor.max_abs_difference:.3g}" for tensor in weights.differing[:10]]
    if not arguments.weights_only:
        ranks = arguments.nproc or parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        logits = compare_logits(
            checkpoint, arguments.hf, parallel=parallel, world_size=ranks, tolerance=arguments.tolerance
        )
        same = same and logits.within_tolerance
        result["logits"] = asdict(logits)
        lines.append(
            f"logits: max |difference| {logits.max_abs_difference:.3g}, mean {logits.mean_abs_difference:.3g}, limit "
            f"{logits.limit:.3g} (std {logits.reference_std:.3g}; {logits.positions} positions, {logits.prompts})"
        )
    result["same"] = same
    lines.append("the same model" if same else "NOT the same model")
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(lines))
    return int(ExitCode.DONE if same else ExitCode.FAILED)
