"""AdamW's update on a CPU: ours, offloaded and not, against torch, Megatron-Core's hybrid and DeepSpeed, in one run.

    python benchmarks/optimizer.py --output benchmarks/results/optimizer.json

Sides, each with parameters of its own, the same values and gradients, taking turns step by step:
    torch      torch.optim.AdamW(fused=True) over all parameters
    ours       `GroupStepAdam`: the same kernel, the step in the parameter group
    offloaded  `OffloadedAdam`: copies of gradient and parameter to and fro around it (here from memory to memory)
    megatron   the CPU's part of Megatron-Core's HybridDeviceOptimizer: one torch.optim.AdamW(fused=True) a parameter
    deepspeed  DeepSpeedCPUAdam, where `deepspeed` is installed and can compile it; otherwise left out and said so
Times are the least over the rounds, which other load disturbs least (medians beside them); ratios are times of
torch's / of the side: above 1 is faster. The first step of each is not counted. The parameters after the last step are
compared too. Takes a minute and 2 GiB by default.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

SETTINGS: dict[str, Any] = {"lr": 2e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-4}


def parameters(count: int, size: int) -> list[torch.nn.Parameter]:
    """Return parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.nn.Parameter(torch.randn(size, generator=generator).mul_(0.02)) for _ in range(count)]
    for parameter in drawn:
        parameter.grad = torch.randn(size, generator=generator)
    return drawn


def sides() -> dict[str, Callable[[list[torch.nn.Parameter]], Callable[[], None]]]:
    """Return side -> a function that takes parameters and returns the update; a side that cannot run is left out."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_xmtf.training.group_step_adam import GroupStepAdam
    from megatron_xmtf.training.offloaded_adam import OffloadedAdam

    def one_a_parameter(params: list[torch.nn.Parameter]) -> Callable[[], None]:
        group = {"params": params, "fused": True, **SETTINGS}
        optimizers = HybridDeviceOptimizer.build_cpu_optimizer_list(torch.optim.AdamW, [group])
        return lambda: [optimizer.step() for optimizer in optimizers][-1]

    found: dict[str, Callable[[list[torch.nn.Parameter]], Callable[[], None]]] = {
        "torch": lambda params: torch.optim.AdamW(params, fused=True, **SETTINGS).step,
        "ours": lambda params: GroupStepAdam(params, **SETTINGS).step,
        "offloaded": lambda params: OffloadedAdam(params, **SETTINGS).step,
        "megatron": one_a_parameter,
    }
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        print(f"deepspeed is left out: {error}")
    else:
        found["deepspeed"] = lambda params: DeepSpeedCPUAdam(params, adamw_mode=True, **SETTINGS).step
    return found


def measure(count: int, size: int, rounds: int) -> dict[str, Any]:
    """Let the sides take turns; return times, ratios and how far their parameters are from torch's."""
    params: dict[str, list[torch.nn.Parameter]] = {}
    updates: dict[str, Callable[[], None]] = {}
    for name, build in sides().items():
        params[name] = parameters(count, size)
        updates[name] = build(params[name])
        updates[name]()
    times: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(rounds):
        names = list(updates)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            updates[name]()
            times[name].append(1e3 * (time.perf_counter() - began))
    least = {name: min(values) for name, values in times.items()}
    return {
        name: {
            "step_time_ms": round(shortest, 2),
            "median_step_time_ms": round(statistics.median(times[name]), 2),
            "numbers_per_second": round(count * size / shortest * 1e3),
            "ratio_to_torch": round(least["torch"] / shortest, 3),
            "largest_difference": max(
                float((ours - theirs).detach().abs().max())
                for ours, theirs in zip(params[name], params["torch"], strict=True)
            ),
        }
        for name, shortest in least.items()
    }


def version(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the results go, as JSON")
    parser.add_argument("--parameters", type=int, default=16)
    parser.add_argument("--numbers", type=int, default=1 << 20, help="in each parameter")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "threads": arguments.threads,
        "parameters": arguments.parameters,
        "numbers_each": arguments.numbers,
        "rounds": arguments.rounds,
        "sides": measure(arguments.parameters, arguments.numbers, arguments.rounds),
    }
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
