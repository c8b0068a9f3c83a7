"""Memory and time of the language-model head and its loss: ours against the plain head, in one run.

    python benchmarks/head.py --output benchmarks/results/head.json

Each side runs in a fresh process, forward and backward, on the same hidden states, weight and labels:
    plain     logits of every position at once, `F.cross_entropy`, prompts masked afterwards, as in `transformers`
    megatron  Megatron-Core's own: the projection of every position, `vocab_parallel_cross_entropy`, masked afterwards
    ours      `kernels.head_loss`, for the positions with a loss alone
Memory is what the process holds at its peak beyond hidden states, weight and labels. The gradient of the weight, which
all sides hand back, is in `peak_mib` and left out of `loss_mib`; the ratio is that of `loss_mib`. Losses and gradients
are compared too. Takes about 5 minutes and 11 GiB with the sizes by default, on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

VOCABULARY = 250_880
MIB = 1 << 20


def draw(positions: int, hidden_size: int, words: int, fraction: float) -> tuple[Any, Any, Any, Any]:
    """Return hidden [n, h], weight [words, h], labels [n] and the weights of the losses [n], mostly 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, hidden_size, generator=generator)
    weight = torch.randn(words, hidden_size, generator=generator).mul_(0.05)
    labels = torch.randint(0, words, (positions,), generator=generator)
    # Every example is a prompt and then its target: the last part of each 256 positions.
    places = torch.arange(positions) % 256
    loss_weights = (places >= 256 * (1 - fraction)).float()
    return hidden, weight, labels, loss_weights


def run_side(side: str, path: str, positions: int, hidden_size: int, words: int, fraction: float) -> dict[str, Any]:
    """Run one side in this process; losses and gradients are written to `path`."""
    import torch

    if side == "megatron":
        from megatron.core import tensor_parallel

        from megatron_xmtf.config import ParallelConfig
        from megatron_xmtf.parallel.topology import initialize_parallel

        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
        initialize_parallel(ParallelConfig(), seed=1)
    from megatron_xmtf.kernels.head_loss import VocabularyShard, head_loss

    hidden, weight, labels, loss_weights = draw(positions, hidden_size, words, fraction)
    chosen = torch.nonzero(loss_weights).squeeze(1)
    hidden.requires_grad_(), weight.requires_grad_()
    warm = torch.ones(64, 64) @ torch.ones(64, 64)  # the library's own threads and buffers
    del warm
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: `ru_maxrss` would hand on the parent's
    before = memory_bytes("VmRSS")
    started = time.perf_counter()
    if side == "ours":
        shard = VocabularyShard(first=0, count=words)
        losses = head_loss(hidden.index_select(0, chosen), weight, labels[chosen], shard=shard)
        total = (losses * loss_weights[chosen]).sum()
    elif side == "plain":
        losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
        total = (losses * loss_weights).sum()
    else:
        logits = (hidden @ weight.t()).unsqueeze(1)
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).squeeze(1)
        del logits
        total = (losses * loss_weights).sum()
    total.backward()
    seconds = time.perf_counter() - started
    peak = memory_bytes("VmHWM") - before
    assert hidden.grad is not None and weight.grad is not None
    torch.save({"total": total.detach(), "hidden": hidden.grad, "weight": weight.grad}, path)
    gradient = weight.grad.numel() * weight.grad.element_size()
    return {"peak_mib": peak / MIB, "loss_mib": (peak - gradient) / MIB, "seconds": seconds}


def memory_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the most since it was reset) of this process; Linux counts them in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def apart(*arguments: Any) -> dict[str, Any]:
    """Run one side in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result: dict[str, Any] = pool.apply(run_side, arguments)
    return result


def compare(paths: dict[str, str]) -> float:
    """Return the largest max|difference| / max|plain| of loss and gradients."""
    import torch

    plain, worst = torch.load(paths["plain"]), 0.0
    for side, path in paths.items():
        other = torch.load(path)
        for name, theirs in plain.items():
            difference = float((other[name] - theirs).abs().max() / theirs.abs().max())
            worst = max(worst, difference)
            assert difference < 1e-4, f"{side}: {name} differs by {difference:.1e}"
    return worst


def measure(positions: int, hidden_size: int, words: int, fraction: float) -> dict[str, Any]:
    """Run all sides for one share of positions with a loss."""
    with tempfile.TemporaryDirectory() as directory:
        paths = {side: str(Path(directory) / side) for side in ("plain", "megatron", "ours")}
        sides = {side: apart(side, path, positions, hidden_size, words, fraction) for side, path in paths.items()}
        worst = compare(paths)
    found: dict[str, Any] = {"target_fraction": fraction, "sides": sides, "largest_difference": worst}
    for other in ("plain", "megatron"):
        found[f"memory_over_{other}"] = sides["ours"]["loss_mib"] / sides[other]["loss_mib"]
        found[f"time_over_{other}"] = sides["ours"]["seconds"] / sides[other]["seconds"]
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--words", type=int, default=VOCABULARY)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.125, 0.25, 1.0], help="with a loss")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sizes = (arguments.positions, arguments.hidden_size, arguments.words)
    results = []
    for fraction in arguments.fractions:
        found = measure(*sizes, fraction)
        results.append(found)
        print(
            f"{fraction:6.1%} of {arguments.positions} positions with a loss: "
            + ", ".join(
                f"{side} {values['loss_mib']:,.0f} MiB ({values['peak_mib']:,.0f} with the weight's gradient) "
                f"{values['seconds']:.1f} s"
                for side, values in found["sides"].items()
            )
            + f"; memory {found['memory_over_plain']:.3f} of plain, {found['memory_over_megatron']:.3f} of megatron; "
            f"time {found['time_over_plain']:.2f}, {found['time_over_megatron']:.2f}; "
            f"largest difference {found['largest_difference']:.1e}",
            flush=True,
        )
    if arguments.output:
        report = {
            "date": date.today().isoformat(),
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
            "sizes": dict(zip(("positions", "hidden_size", "words"), sizes, strict=True)),
            "results": results,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
