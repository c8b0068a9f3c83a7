"""Measure packed attention with T5's learned bias: by segment, beside torch's attention over the whole row.

    python benchmarks/relative_attention.py [--length 1024] [--heads 8] [--repeats 5]

One layer, forward and backward with the bias's gradient, fp32, one thread, CPU time; the three sides take turns, and
the median of each is printed with the ratio. torch's attention computes the gradient of a mask in its plain path alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_xmtf.kernels.relative_attention import choose_relative_attention
from megatron_xmtf.kernels.relative_attention.buckets import bias_by_distance

HEAD_DIM = 64


def segment_ids(length: int, *, mean: int, seed: int) -> Tensor:
    """Fill a row with segments of lognormal lengths of about `mean` tokens: int64 [1, length]."""
    generator, lengths = np.random.default_rng(seed), []
    while sum(lengths) < length:
        lengths.append(max(1, min(length - sum(lengths), int(generator.lognormal(np.log(mean), 0.5)))))
    return torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))[None]


def sides(length: int, heads: int, segments: Tensor) -> dict[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
    """Return what is timed: each gives its output and the gradients of table, query, key and value."""
    torch.manual_seed(0)
    inputs = [torch.randn(length, 1, heads, HEAD_DIM, requires_grad=True) for _ in range(3)]
    table = torch.randn(32, heads, requires_grad=True)
    place = torch.arange(length)
    visible = segments[:, None, :, None] == segments[:, None, None, :]

    def ours(name: str) -> tuple[Tensor, list[Tensor]]:
        chosen = choose_relative_attention(name, device="cpu")
        prepared = chosen.prepare(segments, segments, causal=False)
        bias = bias_by_distance(table, length=prepared.longest, bidirectional=True, max_distance=128)
        output = chosen.attend(*inputs, bias, prepared, scale=1.0)
        return output, list(torch.autograd.grad(output.square().sum(), [table, *inputs]))

    def dense() -> tuple[Tensor, list[Tensor]]:
        bias = bias_by_distance(table, length=length, bidirectional=True, max_distance=128)
        mask = bias[:, place[None] - place[:, None] + length - 1][None].masked_fill(~visible, float("-inf"))
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in inputs)
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        output = context.permute(2, 0, 1, 3).flatten(2)
        return output, list(torch.autograd.grad(output.square().sum(), [table, *inputs]))

    return {"torch, whole row": dense, "reference": lambda: ours("reference"), "segments": lambda: ours("segments")}


def main() -> None:
    """Print one line for each mean length of segments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the row")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, row of {arguments.length}, {arguments.heads} heads of {HEAD_DIM}, CPU ms")
    for mean in (30, 100, 300, arguments.length):
        segments = segment_ids(arguments.length, mean=mean, seed=1)
        if mean == arguments.length:
            segments = torch.ones(1, arguments.length, dtype=torch.int64)
        timed = sides(arguments.length, arguments.heads, segments)
        found = {name: function() for name, function in timed.items()}
        milliseconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(arguments.repeats):
            for name, function in timed.items():
                started = time.process_time()
                function()
                milliseconds[name].append((time.process_time() - started) * 1e3)
        medians = {name: statistics.median(values) for name, values in milliseconds.items()}
        worst = max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(found["segments"][1], found["torch, whole row"][1], strict=True)
        )
        words = "  ".join(f"{name} {value:7.1f}" for name, value in medians.items())
        ratio = medians["torch, whole row"] / medians["segments"]
        print(
            f"{len(segments.unique()):3} segments  {words}  {ratio:5.1f} times as fast  gradients differ by {worst:.1e}"
        )


if __name__ == "__main__":
    main()
