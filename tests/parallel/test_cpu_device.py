"""Each patch of the CPU adapter is needed, and torch stays as it is for everybody else."""

from __future__ import annotations

import importlib.util
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xmtf.errors import RankFailedError
from megatron_xmtf.parallel import cpu_device
from megatron_xmtf.parallel.cpu_device import PATCHES, enter_cpu_device, leave_cpu_device
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU adapter stays out of a GPU run")

NO_CUDA = "Torch not compiled with CUDA enabled"


def seed_random_states(_: Path) -> None:
    """Only start the groups and the RNG states, as every reason does first."""


def build(_: Path, **parallel: Any) -> Any:
    from tests.parallel.tiny_engine import build_engine, run_config

    return build_engine(run_config(use_distributed_optimizer=True, **parallel))


def build_gradient_buffers(_: Path) -> None:
    from tests.parallel.tiny_engine import build_engine, run_config

    build_engine(run_config())


def fork_tracker(_: Path) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        torch.rand(1)


def save(directory: Path) -> None:
    from megatron.core import dist_checkpointing

    from tests.parallel.tiny_engine import ARCHITECTURE, SHARDING, build_model, fill_weights, run_config

    chunks = build_model(ARCHITECTURE, parallel=run_config().parallel)
    fill_weights(chunks)
    state = chunks[0].sharded_state_dict(metadata=dict(SHARDING))
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    dist_checkpointing.save(state, str(directory), content_metadata=SHARDING)


def build_tied_embedding(_: Path) -> None:
    from tests.parallel.tiny_engine import ARCHITECTURE, build_model, run_config

    build_model(ARCHITECTURE, parallel=run_config(pipeline_model_parallel_size=2).parallel)


REASONS: dict[str, tuple[Callable[[Path], Any], int, str, str]] = {
    # patch: what is done, pipeline stages, file of megatron.core that fails, its error
    "current_device": (build_gradient_buffers, 1, "param_and_grad_buffer.py", f"AssertionError: {NO_CUDA}"),
    "factories": (build_gradient_buffers, 1, "optimizer/optimizer.py", f"AssertionError: {NO_CUDA}"),
    "synchronize": (save, 1, "filesystem_async.py", f"AssertionError: {NO_CUDA}"),
    "get_rng_state": (seed_random_states, 1, "tensor_parallel/random.py", f"AssertionError: {NO_CUDA}"),
    "tracker_state": (fork_tracker, 1, "tensor_parallel/random.py", f"AssertionError: {NO_CUDA}"),
    "tensor_cuda": (build_tied_embedding, 2, "language_module.py", f"AssertionError: {NO_CUDA}"),
    "tensor_type": (build, 1, "distrib_optimizer.py", "TypeError"),
}
SILENT = {"manual_seed", "results_queue"}


def in_rank(without: list[str], stages: int, action: Callable[[Path], Any], directory: Path) -> None:
    from megatron_xmtf.config import ParallelConfig

    enter_cpu_device(without=without)
    initialize_parallel(ParallelConfig(pipeline_model_parallel_size=stages), seed=1)
    action(directory)


def test_every_patch_has_its_reason() -> None:
    assert {patch.name for patch in PATCHES} == REASONS.keys() | SILENT
    assert all(patch.reason for patch in PATCHES)


@pytest.mark.parametrize("name", REASONS)
def test_without_the_patch_the_named_call_fails(name: str, tmp_path: Path) -> None:
    action, stages, file, message = REASONS[name]
    with pytest.raises(RankFailedError) as failure:
        run_ranks(in_rank, world_size=stages, arguments=([name], stages, action, tmp_path))
    assert message in str(failure.value)
    innermost = [line for line in str(failure.value).splitlines() if "/megatron/core/" in line][-1]
    assert file in innermost


@pytest.mark.parametrize("action", dict.fromkeys(action for action, *_ in REASONS.values()))
def test_with_all_patches_the_same_calls_work(action: Callable[[Path], Any], tmp_path: Path) -> None:
    stages = 2 if action is build_tied_embedding else 1
    run_ranks(in_rank, world_size=stages, arguments=([], stages, action, tmp_path))


def model_parallel_state(without: list[str]) -> bytes:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_xmtf.config import ParallelConfig

    enter_cpu_device(without=without)
    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    return get_cuda_rng_tracker().get_states()["model-parallel-rng"].numpy().tobytes()


def test_without_manual_seed_tensor_parallel_ranks_draw_the_same_dropout() -> None:
    first, second = run_ranks(model_parallel_state, world_size=2, arguments=(["manual_seed"],))
    assert first == second
    first, second = run_ranks(model_parallel_state, world_size=2, arguments=([],))
    assert first != second


def results_queue(without: list[str]) -> tuple[list[str], bool]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    started: list[str] = []

    class Context:
        def __init__(self, method: str) -> None:
            started.append(method)

        def Manager(self) -> Any:  # noqa: N802 -- the name that multiprocessing has
            return self

        def Queue(self) -> str:  # noqa: N802
            return "of a manager process"

    filesystem_async.mp.get_context = Context
    enter_cpu_device(without=without)
    return started, isinstance(filesystem_async._get_write_results_queue(), queue.Queue)


def test_without_results_queue_each_rank_spawns_a_manager_process() -> None:
    assert run_ranks(results_queue, world_size=1, arguments=(["results_queue"],)) == [(["spawn"], False)]
    assert run_ranks(results_queue, world_size=1, arguments=([],)) == [([], True)]


def what_others_see() -> dict[str, Any]:
    """Ask torch what a library outside of megatron.core would ask."""

    def answer(call: Callable[[], Any]) -> str:
        try:
            return str(call())
        except AssertionError as error:
            return f"AssertionError: {error}"

    return {
        "current_device": answer(torch.cuda.current_device),
        "synchronize": answer(torch.cuda.synchronize),
        "tensor on cuda": answer(lambda: torch.zeros(1, device="cuda")),
        "to cuda": answer(lambda: torch.zeros(1).cuda()),
        "type": torch.zeros(1).type(),
        "type as": torch.zeros(1).type(torch.float64).type(),
        "factories": [id(getattr(torch, name)) for name in cpu_device.FACTORIES],
        "default_seed": torch.default_generator.initial_seed(),
    }


def inside_megatron(expression: str) -> Any:
    """Evaluate an expression as code of a module of megatron.core would."""
    import megatron.core.optimizer.optimizer as module

    return eval(compile(expression, "megatron.core", "eval"), module.__dict__)


def compare_torch_before_within_and_after() -> dict[str, Any]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    def bindings() -> list[Any]:
        import sys

        modules = [name for name in sorted(sys.modules) if name.startswith("megatron.core")]
        return [
            torch.Tensor.cuda,
            torch.Tensor.type,
            random._get_cuda_rng_state,
            random._set_cuda_rng_state,
            filesystem_async._results_queue,
            [name for name in modules if getattr(sys.modules[name], "torch", torch) is not torch],
        ]

    for name in cpu_device.LAZY_MODULES:
        importlib.import_module(name)
    seen_before, bound_before = what_others_see(), bindings()
    enter_cpu_device()
    enter_cpu_device()
    within, inside = what_others_see(), inside_megatron("torch.zeros(1, device='cuda').cuda().type()")
    rebound = bindings()[-1]
    leave_cpu_device()
    return {
        "before": seen_before,
        "within": within,
        "after": what_others_see(),
        "inside": inside,
        "rebound": rebound,
        "restored": all(a is b or a == b for a, b in zip(bound_before, bindings(), strict=True)),
    }


def test_torch_is_untouched_for_others_and_restored_at_the_end() -> None:
    found = run_ranks(compare_torch_before_within_and_after, world_size=1)[0]
    assert found["before"]["current_device"] == f"AssertionError: {NO_CUDA}"
    assert found["before"]["to cuda"] == f"AssertionError: {NO_CUDA}"
    assert found["before"]["type"] == "torch.FloatTensor"
    assert found["within"] == found["before"]
    assert found["after"] == found["before"]
    assert found["inside"] == "torch.cuda.FloatTensor"
    assert len(found["rebound"]) > 50
    assert found["restored"]


def test_importing_the_adapter_patches_nothing() -> None:
    import megatron.core.optimizer.optimizer as module

    def watched() -> list[Any]:
        return [torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.zeros, module.torch]

    before = watched()
    spec = importlib.util.spec_from_file_location("fresh_cpu_device", cpu_device.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = fresh  # dataclasses look their module up
    try:
        spec.loader.exec_module(fresh)
    finally:
        del sys.modules[spec.name]
    assert all(a is b for a, b in zip(before, watched(), strict=True))


def enter_where_cuda_is() -> None:
    torch.cuda.is_available = lambda: True
    enter_cpu_device()


def test_the_adapter_refuses_a_machine_with_cuda() -> None:
    with pytest.raises(RankFailedError, match="must not be entered where CUDA is available"):
        run_ranks(enter_where_cuda_is, world_size=1)
