"""One run of a peer for benchmarks/training.py, in a Python that has transformers, accelerate and trl.

    python benchmarks/training_peers.py --side transformers|grouped|trl --job JOB.json

transformers: `Trainer`, BLOOM, micro-batches of 8 padded to their longest, in the order of the records
grouped:      the same with `train_sampling_strategy="group_by_length"`
trl:          `SFTTrainer` with packing "bfd" and loss on completions alone, GPT-2, attention isolated by position ids

Written to the job's `result`: for each step the moment it ended and its loss; for each micro-batch what it held; the
process's peak memory. Nothing of this project is imported here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

IGNORED = -100


def main() -> None:
    """Run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["transformers", "grouped", "trl"], required=True)
    parser.add_argument("--job", type=Path, required=True)
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    examples = [
        {"input_ids": inputs + targets, "labels": [IGNORED] * len(inputs) + targets}
        for inputs, targets in json.loads(Path(job["examples"]).read_text(encoding="utf-8"))
    ]
    make = sft_trainer if arguments.side == "trl" else plain_trainer
    train(make(examples, job, grouped=arguments.side == "grouped"), job, side=arguments.side, contents=contents)


def train(trainer: Any, job: dict[str, Any], *, side: str, contents: Callable[[Any], dict[str, int]]) -> None:
    """Train, counting what each micro-batch holds, and write the result."""
    watch, collate = StepWatch(), trainer.data_collator
    batches: list[dict[str, int]] = []

    def counted(features: Any) -> Any:
        batch = collate(features)
        batches.append(contents(batch))
        return batch

    trainer.data_collator = counted
    trainer.add_callback(watch)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "began": watch.began,
        "ends": watch.ends,
        "losses": losses,
        "grad_norms": norms,
        "micro_batches": batches[: len(watch.ends) * job["accumulation"][side]],
        "peak_mib": peak_mib(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def plain_trainer(examples: list[dict[str, Any]], job: dict[str, Any], *, grouped: bool) -> Any:
    """Build `transformers.Trainer` over BLOOM."""
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.config.use_cache = False
    strategy = "group_by_length" if grouped else "sequential"
    settings = transformers.TrainingArguments(
        per_device_train_batch_size=job["micro_batch_size"],
        gradient_accumulation_steps=job["accumulation"]["grouped" if grouped else "transformers"],
        train_sampling_strategy=strategy,
        remove_unused_columns=False,
        **common(job),
    )
    pad = model.config.pad_token_id

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(one["input_ids"]) for one in features)
        filled = {"input_ids": pad, "labels": IGNORED}
        batch = {
            name: torch.tensor([one[name] + [value] * (longest - len(one[name])) for one in features])
            for name, value in filled.items()
        }
        lengths = torch.tensor([len(one["input_ids"]) for one in features])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch

    return transformers.Trainer(model=model, args=settings, train_dataset=examples, data_collator=collate)


def sft_trainer(examples: list[dict[str, Any]], job: dict[str, Any], *, grouped: bool) -> Any:
    """Build TRL's `SFTTrainer` over GPT-2, packed as it packs."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    settings = SFTConfig(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job["accumulation"]["trl"],
        packing=True,
        packing_strategy="bfd",
        max_length=job["row_lengths"]["sequence_length"],
        gradient_checkpointing=False,
        **common(job),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["gpt2"], dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["gpt2"])
    return SFTTrainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_list(examples), processing_class=tokenizer
    )


def common(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all peers share with ours."""
    return {
        "output_dir": job["output"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": job["weight_decay"],
        "adam_beta2": job["adam_beta2"],
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "seed": 0,
    }


def contents(batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Count what a micro-batch holds; a label is predicted from the position before it, so the first never is."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask")
    return {
        "computed": tokens.numel(),
        "tokens": tokens.numel() if mask is None else int(mask.sum()),
        "target_tokens": int((batch["labels"][:, 1:] != IGNORED).sum()),
    }


def peak_mib() -> float:
    """Return VmHWM of this process, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class StepWatch(transformers.TrainerCallback):
    """Notes when training began and when each step ended."""

    def __init__(self) -> None:
        self.began, self.ends = 0.0, []

    def on_train_begin(self, *unused: Any, **keywords: Any) -> None:
        """Note the beginning."""
        self.began = time.monotonic()

    def on_step_end(self, *unused: Any, **keywords: Any) -> None:
        """Note the end of an optimizer step."""
        self.ends.append(time.monotonic())


if __name__ == "__main__":
    main()
