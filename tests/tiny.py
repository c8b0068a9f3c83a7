"""Tiny models, tokenizers and datasets for tests, made with the libraries themselves, not with our own code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

VOCAB_SIZE = 300
"""Not a multiple of 128, so that the padding of the vocabulary is always in play."""


def tiny_bloom(*, seed: int = 0, vocab_size: int = VOCAB_SIZE, hidden_size: int = 64, layers: int = 4, heads: int = 4):
    """Return a BloomForCausalLM with weights drawn wide enough that logits spread over several units."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=vocab_size, hidden_size=hidden_size, n_layer=layers, n_head=heads)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 3
    model = BloomForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith(("layernorm.weight", "ln_f.weight")) else 0.0
            width = 0.15 if parameter.dim() > 1 else 0.1
            parameter.copy_(center + width * torch.randn(parameter.shape, generator=generator))
    return model


def write_tiny_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer of 260 words: four special ones, then one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_tiny_bloom(directory: Path, **sizes: int):
    """Write model and tokenizer as a Hugging Face directory; return the model."""
    model = tiny_bloom(**sizes)
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return model


def random_examples(count: int, *, seed: int = 0, longest: int = 12) -> list[tuple[list[int], list[int]]]:
    """Return (inputs, targets) token ids of random lengths from 1."""
    generator = np.random.default_rng(seed)

    def ids() -> list[int]:
        return [int(i) for i in generator.integers(4, 260, generator.integers(1, longest))]

    return [(ids(), ids()) for _ in range(count)]


def write_records(path: Path, count: int, *, seed: int = 0) -> None:
    """Write jsonl records with random lowercase words, in two languages."""
    generator = np.random.default_rng(seed)

    def text(longest: int) -> str:
        return "".join(chr(97 + int(i)) for i in generator.integers(0, 26, generator.integers(2, longest)))

    with open(path, "w", encoding="utf-8") as stream:
        for number in range(count):
            record = {
                "inputs": text(16),
                "targets": text(8),
                "language": ["en", "fr"][number % 2],
                "dataset": "tiny",
            }
            stream.write(json.dumps(record) + "\n")
