"""Records, tokenizer, dataset and models for benchmarks/training.py and encoder_decoder.py, made once a directory.

rendered real records, in a random order            benchmarks/rendered_records.py
  -> a byte-level BPE of 32,000 words trained on them
  -> the first records that fit `longest`           `xmtf preprocess`, and the same ids as JSON for the peers
  -> random BLOOMs in the Hugging Face format, and GPT-2s of the same sizes for TRL, which supports no BLOOM; mT5s as
     wide as mT5-small
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rendered_records import write_records

__all__ = [
    "HIDDEN_SIZE",
    "LAYERS",
    "LONGEST_ROW",
    "MT5_SIZES",
    "TOKENIZER_WORDS",
    "write_dataset",
    "write_model",
    "write_tokenizer",
]

HIDDEN_SIZE, LAYERS, HEADS = 512, 8, 8
MT5_SIZES = {"d_model": 512, "d_kv": 64, "num_heads": 6, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4}
"""Of mT5-small, with half of its layers."""
TOKENIZER_WORDS = 32_000
LONGEST_ROW = 2048
"""Positions that the GPT-2 learns; BLOOM has no such table."""
RECORDS_MEGABYTES = 20
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
REPOSITORY = Path(__file__).parents[1]


def records_file(work: Path, data: Path) -> Path:
    """Render the records once; return those in a random order, as a shuffled mixture has them."""
    (work / "records").mkdir(parents=True, exist_ok=True)
    return write_records(work / "records", data=data, megabytes=RECORDS_MEGABYTES)["shuffled"][0]


def write_tokenizer(work: Path, data: Path) -> Path:
    """Train a byte-level BPE on the records, once; BOS, EOS and padding are 1, 2, 3 as in BLOOM."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = work / "tokenizer"
    if (directory / "tokenizer_config.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with open(records_file(work, data), encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_WORDS,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{row['inputs']} {row['targets']}" for row in rows), trainer=trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_dataset(
    work: Path, data: Path, *, count: int, longest: int | tuple[int, int]
) -> tuple[Path, Path, dict[str, Any]]:
    """Preprocess the first `count` distinct records that fit.

    Args:    longest: tokens of a record; of inputs and of targets, each with its EOS, where there are two.
    Returns: the prefix, the same examples as JSON [[inputs, targets], ...] in the same order, and their statistics.
    """
    from tokenizers import Tokenizer

    from megatron_xmtf.data.example_dataset import ExampleDataset

    tokenizer = write_tokenizer(work, data)
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    name = f"{count}-of-{longest if isinstance(longest, int) else 'x'.join(map(str, longest))}"
    chosen, known = [], set()
    with open(records_file(work, data), encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            # The targets get a space before them and an EOS after them.
            inputs, targets = len(fast.encode(row["inputs"])), len(fast.encode(" " + row["targets"])) + 1
            if isinstance(longest, int):
                fits = inputs + targets <= longest
            else:
                fits = inputs + 1 <= longest[0] and targets <= longest[1]
            if fits and line not in known:
                chosen.append(line)
                known.add(line)
            if len(chosen) == count:
                break
    records, prefix = work / f"{name}.jsonl", work / f"{name}"
    records.write_text("".join(chosen), encoding="utf-8")
    command = ["preprocess", "--input", records, "--tokenizer", tokenizer, "--output-prefix", prefix, "--overwrite"]
    subprocess.run([sys.executable, "-m", "megatron_xmtf", *map(str, command)], check=True, capture_output=True)
    dataset = ExampleDataset.open(prefix)
    examples = [[half.tolist() for half in dataset[number]] for number in range(len(dataset))]
    path = work / f"{name}.ids.json"
    path.write_text(json.dumps(examples), encoding="utf-8")
    lengths = np.array([len(inputs) + len(targets) for inputs, targets in examples])
    targets = sum(len(targets) for _, targets in examples)
    statistics = {
        "records": len(examples),
        "tokens": int(lengths.sum()),
        "target_tokens": targets,
        "target_percent": round(100 * targets / int(lengths.sum()), 1),
        "length_mean": round(float(lengths.mean()), 1),
        "length_median": float(np.median(lengths)),
        "length_longest": int(lengths.max()),
        "inputs_longest": max(len(inputs) for inputs, _ in examples),
        "targets_longest": max(len(targets) for _, targets in examples),
    }
    return prefix, path, statistics


def write_model(work: Path, *, words: int, family: str) -> Path:
    """Write a random model; `family` is bloom, mt5, or gpt2 with BLOOM's layers, tanh-GELU fused as in ours."""
    import torch
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        MT5Config,
        MT5ForConditionalGeneration,
    )

    directory = work / f"{family}-{words}"
    if (directory / "config.json").is_file():
        return directory
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    if family == "bloom":
        sizes: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": words}
        model: Any = BloomForCausalLM(BloomConfig(**sizes, **ids))
    elif family == "mt5":
        # Weights as drawn by default give losses near 100.
        sizes = {**MT5_SIZES, "vocab_size": words, "dropout_rate": 0.0, "initializer_factor": 0.05}
        model = MT5ForConditionalGeneration(MT5Config(**sizes, **ids, decoder_start_token_id=ids["pad_token_id"]))
    else:
        sizes = {"n_embd": HIDDEN_SIZE, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": words}
        sizes |= {"n_positions": LONGEST_ROW, "activation_function": "gelu_pytorch_tanh"}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **ids))
    model.save_pretrained(directory)
    for file in sorted((work / "tokenizer").iterdir()):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory
