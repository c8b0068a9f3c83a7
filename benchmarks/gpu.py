"""Check and measure everything that runs on a GPU, in under ten minutes: kernels, their peers, training steps.

    python benchmarks/gpu.py --output benchmarks/results          one GPU; writes gpu_NAME.json and gpu_NAME.md there
    python benchmarks/gpu.py --smoke --output DIRECTORY           toy sizes, on a CPU too (Triton's interpreter)

1. checks      every kernel of ours in bf16 on fresh random data: its error against float64 is at most twice that of
               plain torch in bf16, forward and backward
2. products    the matrix products of BLOOM, in TFLOP/s: what a step could reach at most
3. attention   packed rows: ours, FlexAttention, torch's flash attention without ALiBi, flash-attn; relative bias
4. head        loss over 250,880 words: ours in Triton and in plain torch, the plain head, Liger's
5. pointwise   norms and activations: torch, compiled, Liger
6. steps       forward, backward and update of BLOOM-560m to 7b1 on packed rows of 2,048, beside `transformers`

Each part is its own process, so that one which fails, or takes all memory, ends alone; what it said is in the results,
and the exit code is then 1. No part starts that would end after --minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

PARTS = {
    # name: (module, seconds that it takes at most)
    "checks": ("gpu_kernels", 90),
    "products": ("gpu_kernels", 30),
    "attention": ("gpu_attention", 180),
    "head": ("gpu_kernels", 60),
    "pointwise": ("gpu_kernels", 60),
    "step 560m": ("gpu_steps", 60),
    "step 1b7": ("gpu_steps", 60),
    "step 3b": ("gpu_steps", 60),
    "step 7b1": ("gpu_steps", 90),
}


def main() -> int:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for all of it")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--smoke", action="store_true", help="toy sizes; figures mean nothing")
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    machine = describe_machine(smoke=arguments.smoke)
    if machine["device"] == "cpu" and not arguments.smoke:
        print("there is no GPU here; --smoke runs toy sizes on a CPU", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for name in arguments.only or PARTS:
        found[name] = run_part(name, smoke=arguments.smoke, ends=ends)
        print(f"{name}: {found[name].get('error') or 'done'}, {found[name].get('seconds', 0):.0f} s", flush=True)
    write(arguments.output, {**machine, "parts": found})
    return int(any("error" in part or not all_hold(part) for part in found.values()))


def describe_machine(*, smoke: bool) -> dict[str, Any]:
    """Name device and versions, in a process of its own that leaves the GPU again."""
    code = (
        "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps({'device': "
        "torch.cuda.get_device_name() if gpu else 'cpu', 'cuda': torch.version.cuda}))"
    )
    said = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    versions = {}
    for name in ("torch", "triton", "megatron-core", "transformers", "liger-kernel", "flash-attn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"date": date.today().isoformat(), "smoke": smoke, **said, "python": platform.python_version(), **versions}


def run_part(name: str, *, smoke: bool, ends: float) -> dict[str, Any]:
    """Run one part in a process of its own and return what it printed last, a JSON object."""
    module, limit = PARTS[name]
    left = ends - time.monotonic()
    if left < limit and not smoke:
        return {"error": f"not started: {left:.0f} s are left, it may take {limit}"}
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if smoke:
        environment.setdefault("TRITON_INTERPRET", "1")
    command = [sys.executable, str(Path(__file__).with_name(f"{module}.py")), name, *(["--smoke"] if smoke else [])]
    limit *= 10 if smoke else 1
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit} s", "seconds": time.monotonic() - began}
    seconds = time.monotonic() - began
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        return {"error": f"exit code {done.returncode}: {lines[-1]}", "traceback": lines[-40:], "seconds": seconds}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "seconds": seconds}


def all_hold(part: dict[str, Any]) -> bool:
    """Return whether no row of a part says that a bound is broken."""
    return all(row.get("holds", True) for row in part.get("rows", []))


def write(directory: Path, results: dict[str, Any]) -> None:
    """Write JSON for programs and Markdown for people."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", results["device"].lower()).strip("_")
    (directory / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(worded(results), encoding="utf-8")
    print(f"written: {directory / name}.json and .md")


def worded(results: dict[str, Any]) -> str:
    """Word the results as Markdown: one table a part."""
    known = ", ".join(f"{key} {results[key]}" for key in ("date", "torch", "triton", "transformers", "cuda"))
    lines = [f"# {results['device']}", "", known, ""]
    if results["smoke"]:
        lines += ["**Toy sizes: the figures mean nothing.**", ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", ""]
        if "error" in part:
            lines += [f"`{part['error']}`", ""]
            continue
        if part.get("note"):
            lines += [part["note"], ""]
        rows = part["rows"]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Word one value of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
