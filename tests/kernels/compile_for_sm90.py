"""Compile every Triton kernel for an H100 or H200 without having one, and print what the machine code says of itself.

    python -m tests.kernels.compile_for_sm90 [PRECISION HEAD_DIM]      few of all kernels, or all of these
    python -m tests.kernels.compile_for_sm90 candidates HEAD_DIM       every cut that benchmarks/gpu_blocks.py tries

One JSON object a kernel: registers a thread, bytes of stack (spilled registers lie there), bytes of shared memory, and
whether tensor cores are used. Run in a process of its own: Triton is told at its import whether it compiles.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTEGERS = ("key_begin_ptr", "key_end_ptr", "query_begin_ptr", "query_end_ptr")
ALWAYS_FP32 = ("log_sum_ptr", "delta_ptr", "of_bias_ptr", "bias_ptr")


ATTENTION = ("attention_forward", "query_gradient", "key_value_gradient")


def few_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names of kernels with precision, head_dim, bias, dropout: what is trained most, and the most registers."""
    for kernel in ATTENTION:
        yield kernel, {"precision": "bf16", "head_dim": 128, "bias": "alibi", "drops": False}
        yield kernel, {"precision": "bf16", "head_dim": 64, "bias": "relative", "drops": False}
    yield "query_gradient", {"precision": "fp32", "head_dim": 128, "bias": "alibi", "drops": False}
    yield "bias_gradient", {"precision": "bf16", "head_dim": 64, "bias": "relative", "drops": False}
    for kernel in (*ATTENTION, "bias_gradient"):  # what a launch makes of rows of one token: see `compile_attention`
        given = {"precision": "bf16", "head_dim": 80, "bias": "relative", "drops": False}
        yield kernel, {**given, "length": 1}


def all_cases(precision: str, head_dim: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every kernel, bias and dropout for a precision and a head_dim."""
    for drops in (False, True):
        given = {"precision": precision, "head_dim": head_dim, "drops": drops}
        for kernel in ATTENTION:
            for bias in ("alibi", "relative", "none"):
                yield kernel, {**given, "bias": bias}
        yield "bias_gradient", {**given, "bias": "relative"}


def candidate_cases(head_dim: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every cut that is tried on a GPU for heads of this width."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from gpu_blocks import CANDIDATES

    from megatron_xmtf.kernels.segment_attention.blocks import Blocks

    for (kernel, width), candidates in CANDIDATES.items():
        for candidate in candidates if width == ("wide" if head_dim > 64 else "narrow") else ():
            given = {"precision": "bf16", "head_dim": head_dim, "bias": "alibi", "drops": False}
            yield kernel, {**given, "blocks": Blocks(*candidate)}


def compile_attention(
    name: str,
    *,
    precision: str,
    head_dim: int,
    bias: Any,
    drops: bool,
    length: int | None = None,
    blocks: Any = None,
) -> dict[str, Any]:
    """Compile one kernel as `attend.py` launches it, for rows of odd lengths and strides that 16 divides.

    Args:  length: of rows: 1, which Triton compiles in as it does every integer that is 1; None: known at the launch.
           blocks: the cut; None: the chosen one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_xmtf.kernels.segment_attention import backward, forward
    from megatron_xmtf.kernels.segment_attention.blocks import choose_blocks

    function = getattr(forward, name, None) or getattr(backward, name)
    block_d = max(16, triton.next_power_of_2(head_dim))
    blocks = blocks or choose_blocks(name, PRECISIONS[precision], block_d, bias, drops=drops)
    constants = {
        **{"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BIAS": bias, "DROPS": drops},
        **{"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "BLOCK": blocks.queries},
        "PRECISION": "ieee" if precision == "fp32" else "tf32",
    }
    if length is not None:
        constants |= dict.fromkeys(("num_queries", "num_keys", "longest"), length)
    signature, attributes = {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = "*i32"
        elif argument == "seed_ptr":
            signature[argument] = "*i64"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in ALWAYS_FP32 else f"*{precision}"
        else:
            signature[argument] = "fp32" if argument in ("scale", "dropout") else "i32"
        if argument.endswith("_ptr") or argument.startswith("stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {k: v for k, v in constants.items() if k in signature}, attributes)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "kernel": name,
        **{"precision": precision, "head_dim": head_dim, "bias": bias, "drops": drops, "length": length},
        "blocks": str(blocks),
        **read_usage(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "has_tensor_cores": "wgmma" in compiled.asm["ptx"],
    }


def compile_head(name: str) -> dict[str, Any]:
    """Compile a kernel of the head's loss, bf16, for a number of words that nothing divides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_xmtf.kernels.head_loss import fused

    function = getattr(fused, name)
    types = {"logits_ptr": "*bf16", "column_ptr": "*i64", "stride": "i32", "num_words": "i32", "WORDS": "constexpr"}
    signature = {argument: types.get(argument, "*fp32") for argument in function.arg_names}
    source = ASTSource(function, signature, {"WORDS": fused.WORDS_AT_ONCE})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return {"kernel": name, **read_usage(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def compile_bias_dropout_add(*, drops: bool) -> dict[str, Any]:
    """Compile bias, dropout and residual, bf16, for a number of columns that nothing divides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_xmtf.kernels.bias_dropout_add import fused

    function = fused.bias_dropout_add_kernel
    constants = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "DROPS": drops, "QUARTER": fused.QUARTER}
    types = {"seed_ptr": "*i64", "columns": "i32", "dropout": "fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {argument: types.get(argument, "*bf16") for argument in function.arg_names}
    compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    usage = read_usage(compiled.asm["cubin"])
    return {"kernel": "bias_dropout_add_kernel", "drops": drops, **usage, "shared_bytes": compiled.metadata.shared}


def read_usage(cubin: bytes) -> dict[str, int]:
    """Read registers and stack of a kernel out of its machine code."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", text)[1])  # type: ignore[index]
        for name, key in (("registers", "REG"), ("stack_bytes", "STACK"))
    }


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "nothing is compiled where Triton interprets"
    if not sys.argv[1:]:
        chosen = few_cases()
    elif sys.argv[1] == "candidates":
        chosen = candidate_cases(int(sys.argv[2]))
    else:
        chosen = all_cases(sys.argv[1], int(sys.argv[2]))
    for name, settings in chosen:
        print(json.dumps(compile_attention(name, **settings)), flush=True)
    for name in ("logit_statistics", "logit_gradient") if not sys.argv[1:] else ():
        print(json.dumps(compile_head(name)), flush=True)
    for drops in (False, True) if not sys.argv[1:] else ():
        print(json.dumps(compile_bias_dropout_add(drops=drops)), flush=True)
