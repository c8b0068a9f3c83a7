"""Triton's interpreter, put right in two places where it is not what a GPU does with bf16.

numpy has no bf16, so the interpreter (3.7) keeps its bits in uint16. It multiplies these bits as integers in `tl.dot`,
and cuts off what a cast from fp32 should round. Tensor cores multiply exactly and add up in fp32; casts round to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

__all__ = ["DEVICE", "correct_bf16"]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


DEVICE = _device()
"""Where tests of Triton kernels run: a GPU if there is one, else interpreted on the CPU."""


@pytest.fixture(scope="module")
def correct_bf16() -> Any:
    """Correct the interpreter while a module's tests run; nothing on a GPU."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return handle(rounded.astype(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(builder, "cast_impl", cast_impl)
        yield
