"""One run of a peer for benchmarks/encoder_decoder.py, in a Python that has transformers and accelerate.

    python benchmarks/encoder_decoder_peers.py --side transformers|grouped --job JOB.json

transformers: `Seq2SeqTrainer`, mT5, `DataCollatorForSeq2Seq`: micro-batches of 8, each side padded to its longest, in
              the order of the records
grouped:      the same with `train_sampling_strategy="group_by_length"`

What is written is that of training_peers.py. Nothing of this project is imported here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from training_peers import IGNORED, common, train


def main() -> None:
    """Run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["transformers", "grouped"], required=True)
    parser.add_argument("--job", type=Path, required=True)
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    train(build_trainer(job, side=arguments.side), job, side=arguments.side, contents=contents)


def build_trainer(job: dict[str, Any], *, side: str) -> transformers.Seq2SeqTrainer:
    """Build the trainer; inputs end with EOS, as targets do, and all labels but padding have a loss."""
    model = transformers.MT5ForConditionalGeneration.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=job["peer_attention"]
    )
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    examples = [
        {"input_ids": [*inputs, model.config.eos_token_id], "labels": targets}
        for inputs, targets in json.loads(Path(job["examples"]).read_text(encoding="utf-8"))
    ]
    settings = transformers.Seq2SeqTrainingArguments(
        per_device_train_batch_size=job["micro_batch_size"],
        gradient_accumulation_steps=job["accumulation"][side],
        train_sampling_strategy="group_by_length" if side == "grouped" else "sequential",
        **common(job),
    )
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED)
    return transformers.Seq2SeqTrainer(model=model, args=settings, train_dataset=examples, data_collator=collate)


def contents(batch: Any) -> dict[str, int]:
    """Count what a micro-batch holds on both sides."""
    targets = int((batch["labels"] != IGNORED).sum())
    return {
        "computed": batch["input_ids"].numel() + batch["labels"].numel(),
        "tokens": int(batch["attention_mask"].sum()) + targets,
        "target_tokens": targets,
    }


if __name__ == "__main__":
    main()
