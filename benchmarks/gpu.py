"""Check and measure everything that runs on a GPU, in under ten minutes: kernels, their peers, training steps.

    python benchmarks/gpu.py --output benchmarks/results          one GPU; writes gpu_NAME.json and gpu_NAME.md there
    python benchmarks/gpu.py --smoke --output DIRECTORY           toy sizes, on a CPU too (Triton's interpreter)

1. checks      every kernel of ours in bf16 on fresh random data: its error against float64 is at most twice that of
               plain torch in bf16, forward and backward
2. products    the matrix products of BLOOM, in TFLOP/s: what a step could reach at most
3. attention   packed rows: ours, FlexAttention, dense SDPA, torch's flash attention without ALiBi, flash-attn 2 and 4;
               relative bias
4. head        loss over 250,880 words: the plain head, ours in Triton and in plain torch, Liger's, Apple's
5. steps       forward, backward and update of BLOOM-560m to 7b1 on packed rows of 2,048, beside `transformers`
6. trainer     `xmtf preprocess`, `train`, resumed, `export`, `verify` of a small model, by the command line
7. blocks      attention's kernels under other sizes of blocks than the chosen ones
8. pointwise   norms, activations, bias with dropout and residual: torch, compiled, Liger, ours

Each part is its own process, so that one which fails, hangs, or takes all memory, ends alone; what it found until then,
and what it said, are in the results, and the exit code is then 1. Nothing goes on beyond --minutes; results are written
after each part. The first table sets what was found beside what is asked (`gpu_report.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_report import write

PARTS = {
    # name: (module, seconds after which it is ended). Together they may take longer than there is; what comes last is
    # what matters least. Half of each is for imports and for what Triton and torch.compile make at first use.
    "checks": ("gpu_kernels", 120),
    "products": ("gpu_kernels", 60),
    "attention": ("gpu_attention", 200),
    "head": ("gpu_kernels", 90),
    "step 1b7": ("gpu_steps", 120),
    "step 3b": ("gpu_steps", 120),
    "step 7b1": ("gpu_steps", 120),
    "trainer": ("gpu_trainer", 120),
    "step 560m": ("gpu_steps", 120),
    "blocks": ("gpu_blocks", 120),
    "pointwise": ("gpu_pointwise", 90),
}
SHORTEST = 20.0
"""Seconds below which no part is started: it would be ended while it imports."""


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
        print(f"{name}: ", end="", flush=True)
        found[name] = part = run_part(name, smoke=arguments.smoke, interprets=machine["device"] == "cpu", ends=ends)
        broken = [row for row in part["rows"] if not row.get("holds", True)]
        print(f"{part.get('error', 'done')}, {part['seconds']:.0f} s, {len(part['rows'])} rows", flush=True)
        for row in broken:
            print(f"  does not hold: {row}", flush=True)
        written = write(arguments.output, {**machine, "parts": found})
    print(f"written: {written}.json and .md")
    return int(any("error" in part or not all_hold(part) for part in found.values()))


def describe_machine(*, smoke: bool) -> dict[str, Any]:
    """Name device and versions, in a process of its own that leaves the GPU again."""
    code = (
        "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps({'device': "
        "torch.cuda.get_device_name() if gpu else 'cpu', 'cuda': torch.version.cuda}))"
    )
    said = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    versions = {}
    peers = ("liger-kernel", "cut-cross-entropy", "flash-attn", "flash-attn-4", "transformer-engine", "apex")
    for name in ("torch", "triton", "megatron-core", "transformers", *peers):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"date": date.today().isoformat(), "smoke": smoke, **said, "python": platform.python_version(), **versions}


def run_part(name: str, *, smoke: bool, interprets: bool, ends: float) -> dict[str, Any]:
    """Run one part in a process of its own and return its rows, its notes, and what went wrong.

    Args:  interprets: Triton's kernels run in Python, where there is no GPU. ends: time.monotonic() of the end of all.
    """
    module, limit = PARTS[name]
    left = ends - time.monotonic()
    if left < SHORTEST:
        return {"error": f"not started: {left:.0f} s are left", "seconds": 0.0, "rows": []}
    limit = min(limit * (10 if interprets else 1), left)
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if interprets:
        environment.setdefault("TRITON_INTERPRET", "1")
    command = [sys.executable, str(Path(__file__).with_name(f"{module}.py")), name, *(["--smoke"] if smoke else [])]
    began = time.monotonic()
    # Files, not pipes: those that torch.compile starts would hold a pipe open after their parent was ended.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=errors, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0), errors.seek(0)
        part = read_rows(said.read().splitlines())
        complaints = errors.read().strip().splitlines() or ["nothing was said"]
    part["seconds"] = time.monotonic() - began
    if code is None:
        part |= {"error": f"ended after {limit:.0f} s", "last words": complaints[-40:]}
    elif code:
        part |= {"error": f"exit code {code}: {complaints[-1]}", "last words": complaints[-40:]}
    return part


def read_rows(lines: list[str]) -> dict[str, Any]:
    """Sort what a part printed into rows and notes; libraries may have printed too."""
    part: dict[str, Any] = {"rows": [], "note": ""}
    for line in lines:
        # The last line of a process that was ended may be half of one.
        if line.startswith('{"row": ') and line.endswith("}}"):
            row = json.loads(line)["row"]
            if row.keys() == {"note"}:
                part["note"] += row["note"]
            else:
                part["rows"].append(row)
    return part


def all_hold(part: dict[str, Any]) -> bool:
    """Return whether no row of a part says that a bound is broken."""
    return all(row.get("holds", True) for row in part["rows"])


if __name__ == "__main__":
    sys.exit(main())
