"""A byte-level BPE tokenizer and a random tiny model, made as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_xmtf.files import atomic_directory, write_json
from megatron_xmtf.quickstart.families import Family
from megatron_xmtf.quickstart.plan import Sizes

__all__ = ["make_model", "train_tokenizer"]

PAD, EOS = "<pad>", "</s>"
SPECIAL_TOKENS = (PAD, EOS)
SENTINEL = "<extra_id_{}>"
"""As T5 and mT5 spell them; the first one is the last id of the vocabulary, and so on downwards."""


def train_tokenizer(texts: Iterable[str], directory: Path, *, family: Family, vocab_size: int) -> None:
    """Train byte-level BPE, as BLOOM's is, and write it as `AutoTokenizer` reads it.

    Args:    texts: what it is trained on. vocab_size: at least 258 (two special tokens and every byte) and the
             family's sentinels.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - family.num_sentinels,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([SENTINEL.format(number) for number in reversed(range(family.num_sentinels))])
    if family.reads_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, backend.token_to_id(EOS))]
        )
    names = {"pad_token": PAD, "eos_token": EOS}
    with atomic_directory(directory) as temporary:
        backend.save(str(temporary / "tokenizer.json"))
        write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        write_json(temporary / "special_tokens_map.json", names)


def make_model(tokenizer_directory: Path, directory: Path, family: Family, sizes: Sizes) -> int:
    """Write a family's random model; it runs torch, so call it in a process of its own.

    Returns: the number of parameters.
    """
    torch.manual_seed(sizes.seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, local_files_only=True)
    model = family.make_model(sizes, tokenizer)
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return sum(parameter.numel() for parameter in model.parameters())
