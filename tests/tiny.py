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


def _tiny_t5_config(config_class: type, *, vocab_size: int, encoder_layers: int, decoder_layers: int, **settings):
    """Sizes that a mistake shows in: heads x d_kv is not d_model, and the stacks are of different depth."""
    return config_class(
        vocab_size=vocab_size,
        d_model=48,
        d_kv=20,
        d_ff=56,
        num_heads=4,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **settings,
    )


def _draw_t5_weights(model, *, seed: int):
    """Draw weights so wide that logits spread over several units, and untie the head unless it is to be scaled."""
    import torch

    if not getattr(model.config, "scale_decoder_outputs", False):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    # A tied head is similar to the embedding that the residual starts with: layers must outweigh it.
    tied = model.lm_head.weight is model.shared.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center, width = 0.0, 0.12
            if tied and name.endswith((".o.weight", ".wo.weight")):
                width = 0.5
            if name.endswith("layer_norm.weight"):
                center, width = 1.0, 0.1
            elif name in ("shared.weight", "lm_head.weight"):
                width = 1.5 if name == "shared.weight" else 0.4
            elif "relative_attention_bias" in name:
                width = 1.0
            parameter.copy_(center + width * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_mt5(*, seed: int = 0, vocab_size: int = VOCAB_SIZE, encoder_layers: int = 4, decoder_layers: int = 3):
    """Return an MT5ForConditionalGeneration: gated GELU, a head of its own."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    sizes = {"vocab_size": vocab_size, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    return _draw_t5_weights(MT5ForConditionalGeneration(_tiny_t5_config(MT5Config, **sizes)), seed=seed)


def tiny_t5(
    version: str, *, seed: int = 0, vocab_size: int = VOCAB_SIZE, encoder_layers: int = 4, decoder_layers: int = 3
):
    """Return a T5ForConditionalGeneration.

    Args:  version: "1.1": gated GELU, a head of its own; "1.0": ReLU, the head is the embedding, its input scaled.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": vocab_size, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    old = {"1.0": True, "1.1": False}[version]
    settings = {"feed_forward_proj": "relu" if old else "gated-gelu", "tie_word_embeddings": old}
    return _draw_t5_weights(T5ForConditionalGeneration(_tiny_t5_config(T5Config, **sizes, **settings)), seed=seed)


def tiny_alexatm(*, seed: int = 0, vocab_size: int = VOCAB_SIZE, encoder_layers: int = 3, decoder_layers: int = 2):
    """Return a Blenderbot with three tables of words, which is an AlexaTM; weights drawn wide."""
    import torch
    from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

    config = BlenderbotConfig(
        vocab_size=vocab_size,
        d_model=48,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        max_position_embeddings=64,
        activation_function="gelu_new",
        dropout=0.0,
        tie_word_embeddings=False,
    )
    # From the configuration itself to generation: Blenderbot's forced EOS and its ban on repetition stay out.
    config.forced_eos_token_id, config.encoder_no_repeat_ngram_size = None, 0
    model = BlenderbotForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "layer_norm.weight" in name else 0.0
            parameter.copy_(center + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model


T5_SPECIAL = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
"""Ids 0 to 3, the first three as in every T5."""


def write_tiny_mt5(directory: Path, **sizes: int):
    """Write a tiny mT5 and its tokenizer as a Hugging Face directory; return the model."""
    model = tiny_mt5(**sizes)
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory, special=T5_SPECIAL)
    return model


def write_tiny_t5(directory: Path, *, version: str, **sizes: int):
    """Write a tiny T5 ("1.0" or "1.1") and its tokenizer as a Hugging Face directory; return the model."""
    model = tiny_t5(version, **sizes)
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory, special=T5_SPECIAL)
    return model


def write_tiny_tokenizer(directory: Path, *, special: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<pad>")) -> None:
    """Write a byte-level tokenizer of 260 words: four special ones, then one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        **({"bos_token": "<s>"} if "<s>" in special else {}),
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
