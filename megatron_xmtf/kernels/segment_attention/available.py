"""Whether the Triton kernels can run here; asked once, at start, before Triton is imported."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Literal

import torch

from megatron_xmtf.errors import ConfigError

__all__ = ["LARGEST_HEAD_DIM", "fused_or", "is_interpreted", "why_not_fused"]

LARGEST_HEAD_DIM = 128
"""Beyond it a block of keys, values and their gradients does not fit the registers of a multiprocessor."""
SMALLEST_CAPABILITY = (8, 0)
"""Ampere: bf16 products, asynchronous copies. The kernels are compiled and read for 9.0 (H100, H200)."""
COMPILERS = ("gcc", "clang")
"""Triton compiles a small launcher for each kernel, once (triton/runtime/build.py)."""


def is_interpreted() -> bool:
    """Return whether Triton runs kernels in Python, on a CPU, a program after the other: for tests alone."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def fused_or(otherwise: str, *, wish: str, key: str, device: Literal["cpu", "cuda"] | None) -> tuple[str, str | None]:
    """Return the name that a wish comes to, and why it is not `fused` where a GPU would have had that.

    Args:    otherwise: what `auto` means where Triton cannot run. key: of the configuration, for the message. device:
             None: where this machine computes, a GPU if it has one.
    Raises:  ConfigError: `fused` was wished for and cannot run.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = why_not_fused(device=device)
    if wish == "auto":
        return (otherwise, None) if device == "cpu" else ("fused" if obstacle is None else otherwise, obstacle)
    if wish == "fused" and obstacle is not None:
        raise ConfigError(f"kernels.{key}=fused cannot run: {obstacle}. Use auto or {otherwise}.")
    return wish, None


def why_not_fused(*, device: Literal["cpu", "cuda"], head_dim: int | None = None) -> str | None:
    """Return why the Triton attention cannot run here, None if it can; head_dim: of the model, if it is known."""
    if find_spec("triton") is None:
        return "it needs the package triton, which is not installed; torch's CUDA builds bring their own"
    if device == "cpu" and not is_interpreted():
        return "Triton compiles for GPUs, and this run computes on a CPU"
    if device == "cuda" and not is_interpreted() and not any(map(shutil.which, COMPILERS)) and "CC" not in os.environ:
        return f"Triton needs a C compiler to start its kernels: {' or '.join(COMPILERS)} on the PATH, or CC"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < SMALLEST_CAPABILITY:
        found, needed = (
            ".".join(map(str, capability)) for capability in (torch.cuda.get_device_capability(), SMALLEST_CAPABILITY)
        )
        return f"it needs compute capability {needed}, this GPU has {found}"
    if head_dim is not None and head_dim > LARGEST_HEAD_DIM:
        return f"its heads have at most {LARGEST_HEAD_DIM} dimensions, those of this model have {head_dim}"
    return None
