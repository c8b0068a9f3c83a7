"""One run of ours for benchmarks/training.py or encoder_decoder.py: the path of `xmtf train`, in one process.

    python benchmarks/training_ours.py --side ours|loop --job JOB.json

ours: `prepare_run` and `Trainer.run` over packed rows, segments isolated; what the peers write is written
loop: steps of `Trainer.train_step`, each beside the same micro-batches through a second copy of the model without
      any trainer: forward, backward, torch's fused AdamW; the order of the two alternates
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from head import MIB, memory_bytes

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.batch import Batch
from megatron_xmtf.models.registry import build_model
from megatron_xmtf.parallel.topology import destroy_parallel, initialize_parallel
from megatron_xmtf.training.prepare import prepare_run
from megatron_xmtf.training.trainer import Trainer


def main() -> None:
    """Run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["ours", "loop"], required=True)
    parser.add_argument("--job", type=Path, required=True)
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    config = run_config(job)
    prepared = prepare_run(config, world_size=1)
    topology = initialize_parallel(config.parallel, seed=config.seed)
    try:
        trainer = Trainer(prepared, topology)
        result = train(trainer) if arguments.side == "ours" else compare_with_bare_loop(trainer)
    finally:
        destroy_parallel()
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def run_config(job: dict[str, Any]) -> RunConfig:
    """Word the job as a run's configuration."""
    return RunConfig.model_validate(
        {
            "model": job["model"],
            "output": job["output"],
            "seed": 0,
            "precision": "fp32",
            "data": {"train": [{"prefix": job["prefix"]}]},
            "batch": {
                "micro_batch_size": 1,
                "global_batch_size": job["accumulation"]["ours"],
                **job["row_lengths"],
            },
            "schedule": {"train_steps": job["steps"], "lr_decay_style": "constant", "lr_warmup_steps": 0},
            "optimizer": {
                "lr": job["learning_rate"],
                "weight_decay": job["weight_decay"],
                "adam_beta2": job["adam_beta2"],
                "clip_grad": 1.0,
            },
            "loss": {"normalization": "target_token"},
            "kernels": {"attention": job["attention"]},
            "checkpoint": {"save_interval": job["steps"] + 1, "save_optimizer": False},
        }
    )


def train(trainer: Trainer) -> dict[str, Any]:
    """Train as `xmtf train` does, and note when each step ended; the checkpoint at the end is not counted."""
    ends: list[float] = []
    metrics: list[dict[str, Any]] = []
    step = trainer.train_step

    def watched() -> dict[str, Any]:
        found = step()
        metrics.append(dict(found))
        ends.append(time.monotonic())
        return found

    trainer.train_step = watched  # type: ignore[method-assign]
    began = time.monotonic()
    trainer.run()
    batch = trainer.config.batch
    return {
        "began": began,
        "ends": ends,
        "losses": [one["loss"] for one in metrics],
        "grad_norms": [one["grad_norm"] for one in metrics],
        "micro_batches": [
            {
                "computed": one["rows"] * batch.sequence_length,
                "tokens": one["tokens"],
                "target_tokens": one["target_tokens"],
            }
            for one in metrics
        ],
        "examples": sum(one["examples"] for one in metrics),
        "peak_mib": memory_bytes("VmHWM") / MIB,
        "parameters": sum(parameter.numel() for chunk in trainer.chunks for parameter in chunk.parameters()),
    }


def compare_with_bare_loop(trainer: Trainer) -> dict[str, Any]:
    """Time steps of the trainer and of a bare loop over the same micro-batches; the first step of each warms up."""
    config = trainer.config
    (model,) = build_model(
        trainer.prepared.architecture, parallel=config.parallel, precision="fp32", kernels=config.kernels
    )
    with torch.no_grad():
        theirs = dict(trainer.chunks[0].module.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs[name])
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    losses: dict[str, list[float]] = {"ours": [], "bare": []}
    sides = {
        "ours": lambda batches: float(trainer.train_step()["loss"]),
        "bare": lambda batches: bare_step(model, optimizer, batches),
    }
    for number in range(config.train_steps):
        batches = trainer.loader.micro_batches(trainer.step)
        for side in sorted(sides, reverse=bool(number % 2)):
            started = time.monotonic()
            losses[side].append(sides[side](batches))
            seconds[side].append(time.monotonic() - started)
    return {"seconds": seconds, "losses": losses}


def bare_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """Do forward, backward and update of one global batch; return its loss."""
    units, total = sum(batch.num_loss_units for batch in batches), 0.0
    optimizer.zero_grad()
    for batch in batches:
        losses = model(batch.tokens, batch.segment_ids, batch.labels, batch.loss_positions)
        loss = (losses * batch.loss_weights).sum() / units
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    return total


if __name__ == "__main__":
    main()
