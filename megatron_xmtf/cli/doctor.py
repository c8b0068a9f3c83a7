"""`xmtf doctor`: can a run start on this machine, on what, with which kernels, and what is missing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

HELP = "this machine: versions, GPU or CPU adapter, kernels chosen, what is missing and what that means"
EXAMPLE = """\
  xmtf doctor
  xmtf doctor --json"""

OWN_NAME = "megatron_xmtf"

UNUSED = "no part of this version uses it"
FUSED_ADAM = "its fused Adam can run on a GPU; kernels.adam says which does"
OPTIONAL = {
    # distribution: (module, what changes with it, what happens without it)
    "triton": (
        "triton",
        "attention on a GPU runs in our Triton kernels",
        "attention on a GPU is dense, in plain torch; torch's CUDA builds bring Triton",
    ),
    "transformer-engine": ("transformer_engine", FUSED_ADAM, "the fused AdamW of torch is used"),
    "apex": ("apex", FUSED_ADAM, "NVIDIA's, built from source; the fused AdamW of torch is used"),
    "flash-attn": ("flash_attn", UNUSED, f"{UNUSED}; attention runs as under `kernels`"),
    "liger-kernel": ("liger_kernel", UNUSED, UNUSED),
    "deepspeed": ("deepspeed", UNUSED, UNUSED),
    "wandb": ("wandb", "logging.wandb can be set", "logging.wandb cannot be set; metrics.jsonl has every step"),
    "tensorboard": (
        "tensorboard",
        "logging.tensorboard can be set",
        "logging.tensorboard cannot be set; metrics.jsonl has every step",
    ),
    "lm-eval": ("lm_eval", UNUSED, f"{UNUSED}; `xmtf evaluate` reads task files"),
}
LITTLE_DISK_GIB = 1.0
"""Less free space than this is worth a word; a checkpoint takes 2 to 18 bytes a parameter."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, print; 0 if a run can start here, 1 if not."""
    import json

    from megatron_xmtf.errors import ExitCode

    found = examine_machine()
    print(json.dumps(found, indent=2) if arguments.json else worded(found))
    return int(ExitCode.DONE if found["ready"] else ExitCode.FAILED)


def examine_machine() -> dict[str, Any]:
    """Collect everything that is reported; `problems` keep a run from starting, `notes` do not."""
    import platform

    from megatron_xmtf import __version__

    found: dict[str, Any] = {
        "ready": False,
        "xmtf": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "required": {},
        "optional": {name: examine_optional(name) for name in OPTIONAL},
        "machine": examine_resources(Path.cwd()),
        "device": None,
        "kernels": None,
        "ranks": None,
        "problems": [],
        "notes": [],
    }
    found["required"], found["problems"] = examine_required()
    if not found["problems"]:
        examine_engine(found)
    for name, entry in found["optional"].items():
        if entry["remark"]:
            found["notes"].append(f"{name}: {entry['remark']}")
    if found["machine"]["free_disk_gib"] < LITTLE_DISK_GIB:
        free = found["machine"]["free_disk_gib"]
        found["notes"].append(f"only {free} GiB are free on the disk of this directory; checkpoints need more")
    found["ready"] = not found["problems"]
    return found


def examine_required() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Compare what is installed with what the package asks for; return (name -> versions, problems)."""
    import platform
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        wanted, python = metadata.requires(OWN_NAME) or [], metadata.metadata(OWN_NAME)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return {}, [f"{OWN_NAME} runs from its source directory without being installed; install it with `make`"]
    problems = []
    if python and not SpecifierSet(python).contains(platform.python_version()):
        problems.append(f"Python {platform.python_version()} is not {python}")
    versions: dict[str, dict[str, Any]] = {}
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        needed = str(requirement.specifier)
        installed = installed_version(requirement.name)
        versions[requirement.name] = {"installed": installed, "needed": needed}
        remedy = f"install it with `pip install '{requirement.name}{needed}'`"
        if installed is None:
            problems.append(f"{requirement.name} is not installed; {remedy}")
        elif not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} is not {needed}; {remedy}")
    return versions, problems


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def examine_optional(name: str) -> dict[str, Any]:
    """Look for an optional package without importing it."""
    from importlib.util import find_spec

    module, meaning_with, meaning_without = OPTIONAL[name]
    spec = find_spec(module)
    entry = {"installed": None, "meaning": meaning_without, "remark": None}
    if spec is None:
        return entry
    if name == "apex" and not is_apex_of_nvidia(spec.submodule_search_locations or []):
        entry["remark"] = "the package of this name is not NVIDIA's (it has no apex.optimizers) and is not used"
        return entry
    entry["installed"], entry["meaning"] = installed_version(name) or "version unknown", meaning_with
    return entry


def is_apex_of_nvidia(directories: Any) -> bool:
    """Tell NVIDIA's apex, which has `apex.optimizers`, from the unrelated package of that name on PyPI."""
    return any((Path(directory) / "optimizers").is_dir() for directory in directories)


def examine_resources(directory: Path) -> dict[str, Any]:
    """Measure what this process may use: cores, memory (within a container's limit), free disk."""
    import shutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    free = shutil.disk_usage(directory).free
    return {"cores": cores, "memory_gib": round(memory / 2**30, 1), "free_disk_gib": round(free / 2**30, 1)}


def examine_engine(found: dict[str, Any]) -> None:
    """Start two ranks (one where there is one GPU), let them meet, and see device and kernels.

    Ranks first: they are forked, and that must come before this process touches a GPU.
    """
    import torch

    from megatron_xmtf.errors import XmtfError
    from megatron_xmtf.kernels.segment_attention.available import why_not_fused
    from megatron_xmtf.parallel.launch import joined_by_launcher, run_ranks

    has_gpu = torch.cuda.is_available()
    count = min(2, torch.cuda.device_count()) if has_gpu else 2
    if joined_by_launcher():
        found["notes"].append("started by a launcher as one rank of several: no ranks of its own were tried")
    else:
        try:
            sums = run_ranks(meet, world_size=count)
            found["ranks"] = {"started": count, "backend": "nccl" if has_gpu else "gloo"}
            if sums != [float(sum(range(1, count + 1)))] * count:
                found["problems"].append(f"{count} local ranks added up their numbers to {sums}")
        except XmtfError as error:
            found["problems"].append(f"{count} local ranks could not work together: {error}")
    found["device"] = examine_device()
    found["kernels"] = examine_kernels()
    obstacle = why_not_fused(device="cuda") if has_gpu else None
    if obstacle is not None:
        found["notes"].append(f"our Triton kernels are not chosen: {obstacle}")


def meet() -> float:
    """Run in each rank: start Megatron-Core's groups and add rank + 1 up over all ranks."""
    import torch

    from megatron_xmtf.config import ParallelConfig
    from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel

    topology = initialize_parallel(ParallelConfig(distributed_timeout_minutes=1), seed=1)
    number = torch.tensor([topology.rank + 1.0], device=topology.device)
    torch.distributed.all_reduce(number)
    destroy_parallel()
    return float(number)


def examine_device() -> dict[str, Any]:
    """Say what models compute on."""
    import torch

    if not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return {"kind": "cpu", "why": built, "engine": "Megatron-Core through the CPU adapter, over gloo", "gpus": []}
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "kind": "cuda",
        "why": f"CUDA {torch.version.cuda}",
        "engine": "Megatron-Core over NCCL",
        "gpus": [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "has_bf16": gpu.major >= 8,
            }
            for gpu in gpus
        ],
    }


def examine_kernels() -> dict[str, dict[str, str]]:
    """Name the implementation of each operation that `auto` chooses, by precision."""
    import torch

    from megatron_xmtf.kernels.activation import choose_activation
    from megatron_xmtf.kernels.adam import choose_adam
    from megatron_xmtf.kernels.bias_dropout_add import choose_bias_dropout_add
    from megatron_xmtf.kernels.head_loss import choose_head_loss
    from megatron_xmtf.kernels.packed_attention import choose_packed_attention
    from megatron_xmtf.kernels.relative_attention import choose_relative_attention
    from megatron_xmtf.kernels.weight_gradient import choose_weight_gradient

    has_cuda = torch.cuda.is_available()
    adam = choose_adam("auto", has_cuda=has_cuda)
    chosen = {
        "fp32": choose_packed_attention("auto", precision="fp32"),
        "bf16": choose_packed_attention("auto", precision="bf16"),
    }
    head = choose_head_loss("auto").__module__.rsplit(".", 1)[-1]
    sums = choose_bias_dropout_add("auto").__module__.rsplit(".", 1)[-1]
    activation = choose_activation("auto", is_tanh_gelu=True)
    relative = choose_relative_attention("auto").name
    return {
        "packed attention": {precision: attention.name for precision, attention in chosen.items()},
        "attention of encoder and decoder": {"fp32": relative, "bf16": relative},
        "head and loss": {"fp32": head, "bf16": head},
        "bias, dropout and residual": {"fp32": sums, "bf16": sums},
        "activation": {"fp32": activation, "bf16": activation},
        # Main parameters are fp32 whatever the precision.
        "adam": {"fp32": adam},
        "weight gradients": {"fp32": choose_weight_gradient("auto", has_cuda=has_cuda)},
    }


def worded(found: dict[str, Any]) -> str:
    """Word the findings for a terminal."""
    machine, device = found["machine"], found["device"]
    lines = [
        f"megatron_xmtf {found['xmtf']}, Python {found['python']}, {found['platform']}",
        f"machine   {machine['cores']} cores, {machine['memory_gib']} GiB memory, {machine['free_disk_gib']} GiB free "
        "on the disk of this directory",
    ]
    if device is not None:
        lines.append(f"device    {device['kind']} ({device['why']}): {device['engine']}")
        lines += [
            f"          {gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"
            for gpu in device["gpus"]
        ]
    if found["ranks"] is not None:
        lines.append(f"ranks     {found['ranks']['started']} local ranks met over {found['ranks']['backend']}")
    for operation, choice in (found["kernels"] or {}).items():
        chosen = ", ".join(f"{precision}: {name}" for precision, name in choice.items())
        lines.append(f"kernels   {operation}  {chosen}")
    lines.append("required")
    for name, version in found["required"].items():
        lines.append(f"  {name:<19} {version['installed'] or 'missing':<12} needs {version['needed'] or 'any'}")
    lines.append("optional")
    for name, entry in found["optional"].items():
        lines.append(f"  {name:<19} {entry['installed'] or '-':<12} {entry['meaning']}")
    lines += [f"note      {note}" for note in found["notes"]]
    lines += [f"PROBLEM   {problem}" for problem in found["problems"]]
    lines.append("a run can start here" if found["ready"] else "no run can start here before the problems are solved")
    return "\n".join(lines)
