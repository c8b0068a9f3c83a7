"""A byte-level BPE tokenizer and a random tiny BLOOM, made as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from megatron_xmtf.files import atomic_directory, write_json
from megatron_xmtf.quickstart.plan import Sizes

__all__ = ["make_model", "train_tokenizer"]

PAD, EOS = "<pad>", "</s>"
SPECIAL_TOKENS = (PAD, EOS)


def train_tokenizer(texts: Iterable[str], directory: Path, *, vocab_size: int) -> None:
    """Train byte-level BPE, as BLOOM's is, and write it as `AutoTokenizer` reads it.

    Args:    texts: what it is trained on. vocab_size: at least 258 (two special tokens and every byte).
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    names = {"pad_token": PAD, "eos_token": EOS}
    with atomic_directory(directory) as temporary:
        backend.save(str(temporary / "tokenizer.json"))
        write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        write_json(temporary / "special_tokens_map.json", names)


def make_model(tokenizer_directory: Path, directory: Path, sizes: Sizes) -> int:
    """Make a random `BloomForCausalLM`; it runs torch, so call it in a process of its own.

    Returns: the number of parameters.
    """
    torch.manual_seed(sizes.seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, local_files_only=True)
    config = BloomConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        n_layer=sizes.num_layers,
        n_head=sizes.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = BloomForCausalLM(config)
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return sum(parameter.numel() for parameter in model.parameters())
