"""Let Megatron-Core 0.16 run on a machine without CUDA, over gloo.

Megatron-Core names "cuda" in its own code. `enter_cpu_device` rebinds the name `torch` inside the modules of
`megatron.core` to a proxy that answers those calls for the CPU; `torch` itself stays as it is for everybody else.
Two methods of `torch.Tensor` cannot be reached that way and answer differently to callers in `megatron.core` alone.

This is an adapter, never a place for features: it is entered only where CUDA is absent, nothing happens at import,
and each patch is one entry of `PATCHES` with the call that fails without it (tests/parallel/test_cpu_device.py
takes each one away and sees that call fail).
"""

from __future__ import annotations

import importlib
import queue
import sys
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["PATCHES", "Patch", "enter_cpu_device", "leave_cpu_device"]

FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange")

LAZY_MODULES = (
    # Imported by Megatron-Core inside functions; a module that is imported after the rebinding would be missed.
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.transformer.transformer_block",
    "megatron.core.models.common.language_module.language_module",
)


@dataclass(frozen=True)
class Patch:
    """One thing that Megatron-Core asks of CUDA, and the CPU's answer.

    `install` makes the change and returns the function that takes it back.
    """

    name: str
    reason: str
    """The call that fails without the patch, or the wrong value that it gives."""
    install: Callable[[], Callable[[], None]]


class _TorchProxy(types.ModuleType):
    """Stands for `torch` inside `megatron.core`: own attributes first, the real module's otherwise."""

    def __init__(self, real: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


_torch_proxy = _TorchProxy(torch)
_cuda_proxy = _TorchProxy(torch.cuda)
_undo: list[Callable[[], None]] = []


def enter_cpu_device(*, without: Collection[str] = ()) -> None:
    """Rebind `torch` in every module of `megatron.core` and install the patches; a second call does nothing.

    Args:    without: names of patches to leave out; for the tests that show why each one is there.
    Raises:  RuntimeError: CUDA is available (the adapter must stay out of a GPU run).
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be entered where CUDA is available")
    if _undo:
        return
    for name in LAZY_MODULES:
        importlib.import_module(name)
    _undo.append(_rebind_torch())
    for patch in PATCHES:
        if patch.name not in without:
            _undo.append(patch.install())


def leave_cpu_device() -> None:
    """Take back everything that `enter_cpu_device` changed."""
    while _undo:
        _undo.pop()()


def _rebind_torch() -> Callable[[], None]:
    """Point the name `torch` of every loaded `megatron.core` module at the proxy."""
    _torch_proxy.__dict__["cuda"] = _cuda_proxy
    rebound = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch
    ]
    for module in rebound:
        module.torch = _torch_proxy  # type: ignore[attr-defined]

    def undo() -> None:
        for module in rebound:
            module.torch = torch  # type: ignore[attr-defined]

    return undo


def _proxy_attribute(proxy: _TorchProxy, name: str, value: Any) -> Callable[[], Callable[[], None]]:
    """Make an installer that sets one attribute of a proxy."""

    def install() -> Callable[[], None]:
        proxy.__dict__[name] = value
        return lambda: proxy.__dict__.pop(name, None)

    return install


def _factory_on_cpu(name: str) -> Callable[..., torch.Tensor]:
    real = getattr(torch, name)

    def factory(*arguments: Any, **keywords: Any) -> torch.Tensor:
        device = keywords.get("device")
        if device is not None and torch.device(device).type == "cuda":
            keywords["device"] = "cpu"
        return real(*arguments, **keywords)

    return factory


def _install_factories() -> Callable[[], None]:
    undo = [_proxy_attribute(_torch_proxy, name, _factory_on_cpu(name))() for name in FACTORIES]

    def undo_all() -> None:
        for step in undo:
            step()

    return undo_all


def _install_tracker_state() -> Callable[[], None]:
    """Point the RNG tracker's two module functions at the one CPU generator."""
    from megatron.core.tensor_parallel import random

    saved = random._get_cuda_rng_state, random._set_cuda_rng_state

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state

    def undo() -> None:
        random._get_cuda_rng_state, random._set_cuda_rng_state = saved

    return undo


def _install_tensor_method(name: str, replacement: Callable[..., Any]) -> Callable[[], Callable[[], None]]:
    """Make an installer of a `torch.Tensor` method that differs for callers in `megatron.core` alone."""

    def install() -> Callable[[], None]:
        real = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core"):
                return replacement(real, tensor, *arguments, **keywords)
            return real(tensor, *arguments, **keywords)

        setattr(torch.Tensor, name, method)
        return lambda: setattr(torch.Tensor, name, real)

    return install


def _type_as_on_cuda(real: Callable[..., Any], tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    if arguments or keywords:
        return real(tensor, *arguments, **keywords)
    return real(tensor).replace("torch.", "torch.cuda.", 1)


def _install_results_queue() -> Callable[[], None]:
    """Collect the results of a synchronous save in a plain queue of this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    saved = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()

    def undo() -> None:
        filesystem_async._results_queue = saved

    return undo


PATCHES = (
    Patch(
        "current_device",
        "distributed/param_and_grad_buffer.py asks torch.cuda.current_device() for the gradient buffer: AssertionError",
        _proxy_attribute(_cuda_proxy, "current_device", lambda: torch.device("cpu")),
    ),
    Patch(
        "factories",
        'optimizer.py, clip_grads.py, grad_scaler.py and schedules.py make tensors with device="cuda": AssertionError',
        _install_factories,
    ),
    Patch(
        "synchronize",
        "strategies/filesystem_async.py and timers.py call torch.cuda.synchronize(): AssertionError",
        _proxy_attribute(_cuda_proxy, "synchronize", lambda device=None: None),
    ),
    Patch(
        "get_rng_state",
        "tensor_parallel/random.py keeps torch.cuda.get_rng_state() when a named state is added: AssertionError",
        _proxy_attribute(_cuda_proxy, "get_rng_state", lambda device="cuda": torch.get_rng_state()),
    ),
    Patch(
        "manual_seed",
        "SILENT: torch.cuda.manual_seed() is only queued without CUDA, so every name and every tensor-parallel rank "
        "gets one and the same state, and dropout masks are equal on all of them",
        _proxy_attribute(_cuda_proxy, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed)),
    ),
    Patch(
        "tracker_state",
        "tensor_parallel/random.py reads and sets CUDA generator states around every forked region: AssertionError",
        _install_tracker_state,
    ),
    Patch(
        "tensor_cuda",
        "language_module.py moves the tied embedding with .cuda() under pipeline parallelism: AssertionError",
        _install_tensor_method("cuda", lambda real, tensor, *arguments, **keywords: tensor),
    ),
    Patch(
        "tensor_type",
        "optimizer.py and distrib_optimizer.py accept parameters of type torch.cuda.*Tensor alone: TypeError",
        _install_tensor_method("type", _type_as_on_cuda),
    ),
    Patch(
        "results_queue",
        "strategies/filesystem_async.py starts a spawned manager process in every rank, which imports the main module "
        "again (6 to 12 s; EOFError without a __main__ guard)",
        _install_results_queue,
    ),
)
