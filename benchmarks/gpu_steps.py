"""Training steps for benchmarks/gpu.py: ours on packed rows, beside `transformers` on the same tokens.

Ours: Megatron-Core's model, gradient buckets and optimizer as `xmtf train` builds them, bf16 with fp32 main parameters,
one process. `transformers`: BloomForCausalLM, fp32 parameters under bf16 autocast, torch's fused AdamW, as its Trainer
runs; it sees through the borders of segments and computes logits everywhere. Weights are random.

MFU counts model FLOPs (`training/flops.py`: full attention, head for every token) against the data sheet's peak.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_timing as timing
import torch
from torch import Tensor

from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.training.flops import model_flops_per_token, peak_tflops, useful_flops

SIZES = {
    # hidden size, layers, heads, rows of a micro-batch that are tried, recomputation for each, time for the peer
    "560m": (1024, 24, 16, [(16, "none"), (8, "none")], True),
    "1b7": (2048, 24, 16, [(16, "none"), (8, "none"), (4, "none")], True),
    "3b": (2560, 30, 32, [(8, "none"), (4, "none"), (2, "none")], True),
    "7b1": (4096, 30, 32, [(2, "none"), (2, "full"), (1, "full")], False),
}
VOCABULARY = 250_880
MICRO_BATCHES, STEPS = 2, 4
"""Micro-batches of a step; steps, of which the first, which compiles, is not counted."""


def step(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Measure one size."""
    size = name.split()[1]
    hidden, layers, heads, tries, has_peer = SIZES[size]
    length, words = 2048, VOCABULARY
    if smoke:
        hidden, layers, heads, length, words = 32, 1, 2, 40, 512
        tries = [(1, recompute) for _, recompute in tries[-1:]]
    architecture = BloomArchitecture(hidden_size=hidden, num_layers=layers, num_attention_heads=heads, vocab_size=words)
    yield {
        "note": f"BLOOM-{size}, rows of {length}, {MICRO_BATCHES} micro-batches a step, median of {STEPS - 1} steps."
    }
    sides: dict[str, list[tuple[int, str]]] = {"ours": tries}
    if has_peer:
        sides["transformers"] = [(max(1, rows // 2), "none") for rows, _ in tries]
    for side, sizes in sides.items():
        for rows, recompute in sizes:
            batches = draw_batches(rows, length, words, smoke=smoke)
            if side == "ours":
                kernels = "auto" if smoke and size == "7b1" else "fused"
                build = partial(our_step, architecture, batches, recompute=recompute, kernels=kernels)
            else:
                build = partial(transformers_step, architecture, batches)
            row = measure(architecture, batches, build)
            yield {"side": side, "rows": rows, "recompute": recompute, **row}
            if "remark" not in row:
                break


def draw_batches(rows: int, length: int, words: int, *, smoke: bool) -> list[dict[str, Tensor]]:
    """Draw packed micro-batches; the last fifth of each segment is its target."""
    generator = timing.fresh_generator()
    batches = []
    for _ in range(MICRO_BATCHES):
        segment_ids = timing.packed_rows(rows, length, mean=8 if smoke else 200, generator=generator)
        tokens = torch.randint(0, words, segment_ids.shape, generator=generator).to(timing.DEVICE)
        labels = tokens.roll(-1, dims=1)
        goes_on = torch.nn.functional.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (0, 1)) & (segment_ids > 0)
        place = torch.rand(segment_ids.shape, generator=generator).to(timing.DEVICE)
        is_target = goes_on & (place < 0.2)
        positions = is_target.t().flatten().nonzero().flatten()
        batches.append(
            {
                **{"tokens": tokens, "segment_ids": segment_ids, "labels": labels},
                **{"is_target": is_target, "positions": positions},
            }
        )
    return batches


def measure(
    architecture: BloomArchitecture, batches: list[dict[str, Tensor]], build: Callable[[], Callable[[], float]]
) -> dict[str, Any]:
    """Build a side, run its steps, and count; what does not fit the memory is said in a remark."""
    try:
        losses, seconds = run_steps(build)
    except torch.OutOfMemoryError:
        losses, seconds = [], []
    # Only here has nobody the model any longer: neither a frame of `run_steps` nor the exception that holds its frames.
    peak = torch.cuda.max_memory_allocated() / timing.GIB if timing.DEVICE == "cuda" else None
    release()
    if not losses:
        return {"remark": "out of memory"}
    taken = statistics.median(seconds[1:])
    tokens = sum(batch["tokens"].numel() for batch in batches)
    real = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    targets = sum(int(batch["is_target"].sum()) for batch in batches)
    pairs = sum(timing.visible_pairs(batch["segment_ids"]) for batch in batches)
    length = batches[0]["tokens"].size(1)
    model_tflops = model_flops_per_token(architecture, sequence_length=length) * tokens / taken / 1e12
    useful = useful_flops(architecture, tokens=real, attention_pairs=pairs, target_tokens=targets) / taken / 1e12
    limit = peak_tflops(torch.cuda.get_device_name(), precision="bf16") if timing.DEVICE == "cuda" else None
    return {
        "step ms": 1e3 * taken,
        "first step s": seconds[0],
        "tokens/s": tokens / taken,
        "target tokens/s": targets / taken,
        "model TFLOP/s": model_tflops,
        "MFU %": None if limit is None else 100 * model_tflops / limit,
        "useful TFLOP/s": useful,
        "useful MFU %": None if limit is None else 100 * useful / limit,
        "GiB": peak,
        "first loss": losses[0],
        "loss": losses[-1],
        "holds": losses[-1] < losses[0],
    }


def run_steps(build: Callable[[], Callable[[], float]]) -> tuple[list[float], list[float]]:
    """Build a side and run its steps; return their losses and seconds."""
    one_step = build()
    losses, seconds = [], []
    for _ in range(STEPS):
        synchronize()
        began = time.perf_counter()
        losses.append(one_step())
        synchronize()
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def synchronize() -> None:
    """Wait for the device."""
    if timing.DEVICE == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Give memory back, and end our process groups."""
    from megatron_xmtf.parallel.topology import destroy_parallel

    if torch.distributed.is_initialized():
        destroy_parallel()
    gc.collect()
    if timing.DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def our_step(
    architecture: BloomArchitecture, batches: list[dict[str, Tensor]], *, recompute: str, kernels: str
) -> Callable[[], float]:
    """Build our model and optimizer; return one step of it. kernels: of our own ones, `fused` or `auto`."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.utils import get_model_config

    from megatron_xmtf.config import RunConfig
    from megatron_xmtf.models.registry import build_model
    from megatron_xmtf.parallel.topology import initialize_parallel
    from megatron_xmtf.training.optimizer import build_optimizer, set_learning_rate

    # Triton's interpreter multiplies bf16 wrongly: on a CPU they train in fp32, and the others in bf16.
    precision: Any = "fp32" if timing.DEVICE == "cpu" and kernels == "fused" else "bf16"
    config = RunConfig.model_validate(
        {
            **{"model": "unused", "output": "unused", "precision": precision},
            "kernels": dict.fromkeys(("attention", "head_loss", "bias_dropout_add"), kernels),
            "data": {"train": [{"prefix": "unused"}]},
            "batch": {"sequence_length": batches[0]["tokens"].size(1), "global_batch_size": 1},
            "schedule": {"train_steps": STEPS},
            "recompute": {"granularity": recompute},
        }
    )
    initialize_parallel(config.parallel, seed=1)
    (model,) = build_model(
        architecture, parallel=config.parallel, precision=precision, recompute=config.recompute, kernels=config.kernels
    )
    initialise(model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config=get_model_config(model), ddp_config=settings, module=model)
    optimizer = build_optimizer(config, [chunk])
    set_learning_rate(optimizer, 1e-4)
    targets = sum(len(batch["positions"]) for batch in batches)

    def one_step() -> float:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        total = torch.zeros((), device=timing.DEVICE)
        for batch in batches:
            losses = chunk(batch["tokens"], batch["segment_ids"], batch["labels"], batch["positions"])
            loss = (losses * batch["is_target"]).sum() / targets
            loss.backward()
            total += loss.detach()
        chunk.finish_grad_sync()
        optimizer.step()
        return float(total)

    return one_step


def initialise(model: torch.nn.Module) -> None:
    """Draw matrices as BLOOM's, set norms to 1 and biases to 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def transformers_step(architecture: BloomArchitecture, batches: list[dict[str, Tensor]]) -> Callable[[], float]:
    """Build the peer; return one step of it."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        hidden_size=architecture.hidden_size,
        n_layer=architecture.num_layers,
        n_head=architecture.num_attention_heads,
        vocab_size=architecture.vocab_size,
        use_cache=False,
    )
    with torch.device(timing.DEVICE):
        model = BloomForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    targets = sum(len(batch["positions"]) for batch in batches)

    def one_step() -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=timing.DEVICE)
        for batch in batches:
            with torch.autocast(timing.DEVICE, dtype=torch.bfloat16):
                logits = model(input_ids=batch["tokens"]).logits
            labels = batch["labels"].masked_fill(~batch["is_target"], -100)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / targets).backward()
            total += loss.detach() / targets
        optimizer.step()
        return float(total)

    return one_step


if __name__ == "__main__":
    timing.run({"step": step})
