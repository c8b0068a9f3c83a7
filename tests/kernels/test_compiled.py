"""Triton kernels compiled for an H100 or H200: no register is spilled, tensor cores run, shared memory suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SHARED_BYTES = 227 * 1024
"""What a block of an H100 or H200 may have (compute capability 9.0)."""


def compiled(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.kernels.compile_for_sm90", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        # fp32 is multiplied exactly, which tensor cores cannot; the head's kernels multiply nothing.
        if "precision" in kernel:
            assert kernel["has_tensor_cores"] == (kernel["precision"] != "fp32"), kernel
        assert kernel["stack_bytes"] == 0, f"registers are spilled: {kernel}"


def test_kernels_compile_without_spilled_registers() -> None:
    kernels = compiled()
    assert {kernel["kernel"] for kernel in kernels} == {
        "attention_forward",
        "query_gradient",
        "key_value_gradient",
        "bias_gradient",
        "logit_statistics",
        "logit_gradient",
        "bias_dropout_add_kernel",
    }
    check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_kernel_compiles_without_spilled_registers(precision: str, head_dim: int) -> None:
    kernels = compiled(precision, str(head_dim))
    assert len(kernels) == 20  # three with three biases and one, with and without dropout
    check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_every_cut_that_is_tried_on_a_gpu_compiles_without_spilled_registers(head_dim: int) -> None:
    kernels = compiled("candidates", str(head_dim))
    assert {kernel["kernel"] for kernel in kernels} == {"attention_forward", "query_gradient", "key_value_gradient"}
    check(kernels)
