"""Architectures by name, for runs that start from random weights: `model: preset:alexatm-20b`.

                        alexatm-20b      alexatm-toy
    layers              46 + 32          3 + 2
    hidden, heads, ffn  4,096 32 16,384  64 4 256
    words, positions    150,000 1,024    512 128

Token ids are those of the run's tokenizer (`with_token_ids`); here they are only places.

Source:  Soltan et al. 2022, arXiv 2208.01448: section 2, table 1 (layers, sizes, 150K words, learned positions, pre-LN,
         decoder embeddings initialised from the encoder's and not tied) and section 3 (sequences of about 1,024 tokens,
         whence 1,024 positions). 19.75 B parameters are published; `parameter_count` gives 19.71 B with a head of its
         own. dropout 0.1: BART, whose class theirs is derived from (Lewis et al. 2020; `transformers` BartConfig).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.models.alexatm_config import ALEXATM
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture

__all__ = ["PRESETS", "preset", "with_token_ids"]

PRESETS = {
    "alexatm-20b": EncoderDecoderArchitecture(
        hidden_size=4096,
        num_encoder_layers=46,
        num_decoder_layers=32,
        num_attention_heads=32,
        head_dim=128,
        ffn_hidden_size=16_384,
        vocab_size=150_000,
        max_positions=1024,
        dropout=0.1,
        **ALEXATM,
    ),
    # Ours: the same in every option, small enough for a test on two cores.
    "alexatm-toy": EncoderDecoderArchitecture(
        hidden_size=64,
        num_encoder_layers=3,
        num_decoder_layers=2,
        num_attention_heads=4,
        head_dim=16,
        ffn_hidden_size=256,
        vocab_size=512,
        max_positions=128,
        dropout=0.0,
        **ALEXATM,
    ),
}


def preset(name: str) -> EncoderDecoderArchitecture:
    """Return an architecture by its name.

    Raises:  ConfigError: no such preset; lists the near ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; {nearest_names(name, PRESETS)}.")
    return PRESETS[name]


def with_token_ids(architecture: EncoderDecoderArchitecture, *, pad_id: int, eos_id: int) -> EncoderDecoderArchitecture:
    """Return an architecture with a tokenizer's ids; decoders start with EOS, as BART's do."""
    return replace(architecture, pad_token_id=pad_id, eos_token_id=eos_id, decoder_start_token_id=eos_id)
