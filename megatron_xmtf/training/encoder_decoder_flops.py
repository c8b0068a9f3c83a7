"""Floating-point operations of an encoder-decoder's step, counted as `flops.py` counts those of a BLOOM.

    a row of e encoder and d decoder tokens, forward; h hidden_size, a heads x head_dim, f columns of the feed-forward
    of w weight matrices (3 gated, else 2), V words
      encoder layer    e tokens through 4 h a + w h f weights                  2 e (4 h a + w h f)
                       scores and values of e x e pairs                        4 e^2 a
      decoder layer    d tokens through 6 h a + w h f: self-attention's 4,     2 d (6 h a + w h f)
                       query and output of cross-attention
                       e tokens through key and value of cross-attention       2 e (2 h a)
                       pairs: d x d of its own, d x e across                   4 d (d + e) a
      output layer     d tokens                                                2 d h V

    model FLOPs    forward and backward, three times that; whole rows, every pair, the padded vocabulary
    useful FLOPs   three times the same sum over tokens that are not padding, pairs that are seen (n^2 of an encoder
                   segment, n (n + 1) / 2 of a decoder's, n_d n_e across), and the real words at target tokens

    mT5-small (8 + 8 layers, h 512, a 384, f 1024, V 250,112) at e = d = 1024, GFLOP a row, forward
      encoder layers   8 (2 x 1024 x 2,359,296 + 1.61)       51.54
      decoder layers   8 (2 x 1024 x 3,145,728 + 3.22)       77.31     keys and values across count with the e tokens
      output layer     2 x 1024 x 512 x 250,112             262.26

Source:  Narayanan et al. 2021, section 5.1, for the method; the layers are those of `models/encoder_decoder_layers.py`.
"""

from __future__ import annotations

from megatron_xmtf.models.architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.stages import head_cost, layer_costs

__all__ = ["model_flops_per_row", "useful_flops_of_two_sides"]


def model_flops_per_row(architecture: EncoderDecoderArchitecture, *, encoder_length: int, decoder_length: int) -> float:
    """Return the model FLOPs of forward and backward for one row, as the module's docstring has them."""
    layers = sum(layer_costs(architecture, encoder_length, decoder_length))
    return 3.0 * (layers + head_cost(architecture, decoder_length=decoder_length))


def useful_flops_of_two_sides(
    architecture: EncoderDecoderArchitecture,
    *,
    encoder_tokens: int,
    target_tokens: int,
    encoder_pairs: int,
    decoder_pairs: int,
    cross_pairs: int,
) -> float:
    """Return the useful FLOPs of forward and backward, as the module's docstring has them.

    Args:    encoder_tokens, target_tokens: not padding. *_pairs: (query, key) pairs that are seen in one layer.
    """
    hidden, inner = architecture.hidden_size, architecture.attention_size
    encoder, decoder = architecture.num_encoder_layers, architecture.num_decoder_layers
    feed_forward = (3 if architecture.gated else 2) * hidden * architecture.ffn_hidden_size
    per_encoder_token = encoder * (4 * hidden * inner + feed_forward) + decoder * 2 * hidden * inner
    per_target_token = decoder * (6 * hidden * inner + feed_forward) + hidden * architecture.vocab_size
    pairs = encoder * encoder_pairs + decoder * (decoder_pairs + cross_pairs)
    return 6.0 * (encoder_tokens * per_encoder_token + target_tokens * per_target_token) + 12.0 * inner * pairs
