"""Floating-point operations of a step, counted in two ways, and what a GPU can do at most.

    model FLOPs    what the field reports: every token of a row, padding too; full attention; the output layer for all
                   of them; forward and backward, recomputation not
    useful FLOPs   what the run is for: tokens that are not padding; each attends to itself and what stands before it
                   in its own segment, under prefix-LM inputs to all inputs; the output layer where there is a loss,
                   over the words that exist

    BLOOM-560m (l 24, h 1024, V 250,880) at s 2048, GFLOP a token, forward and backward
      layers             72 l h^2           1.812
      attention, full    12 l h s           0.604      useful: 6 l h (n + 1) in a segment of n tokens
      output layer       6 h V              1.541      useful: at target tokens alone
      model FLOPs        the sum            3.957

The sum is 72 l h^2 (1 + s / 6h + V / 12lh). A matrix of w weights costs 2w FLOPs a token forward and 4w backward;
a layer has 12 h^2 weights, and a pair of query and key costs 4h forward (score and value).

MFU = model FLOPs / (seconds x GPUs x peak FLOP/s), in percent.

Source:  Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
         section 5.1 (there with recomputation: 96 and V / 16lh); MFU: Chowdhery et al. 2022, "PaLM", appendix B.
"""

from __future__ import annotations

import re

from megatron_xmtf.models.architecture import BloomArchitecture

__all__ = ["PEAK_TFLOPS", "model_flops_per_token", "peak_tflops", "useful_flops"]

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    # Words that a GPU's name must all hold; the first that fits counts, so variants stand before the plain name.
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
)
"""Dense TFLOP/s in bf16 and fp16, without sparsity; NVIDIA's data sheets (SXM parts where nothing else is said)."""


def model_flops_per_token(architecture: BloomArchitecture, *, sequence_length: int) -> float:
    """Return the model FLOPs of forward and backward for one token of a row, as the module's docstring has them."""
    hidden, layers = architecture.hidden_size, architecture.num_layers
    attention = sequence_length / (6 * hidden)
    head = architecture.padded_vocab_size / (12 * layers * hidden)
    return 72.0 * layers * hidden**2 * (1 + attention + head)


def useful_flops(architecture: BloomArchitecture, *, tokens: int, attention_pairs: int, target_tokens: int) -> float:
    """Return the useful FLOPs of forward and backward, as the module's docstring has them.

    Args:    tokens: not padding. attention_pairs: (query, key) pairs of one segment, the key not after the query:
             n (n + 1) / 2 for a segment of n tokens, p (p - 1) / 2 more if p of them are inputs under prefix-LM.
             target_tokens: tokens with a loss.
    """
    hidden, layers = architecture.hidden_size, architecture.num_layers
    body = 72.0 * layers * hidden**2 * tokens
    attention = 12.0 * layers * hidden * attention_pairs
    head = 6.0 * hidden * architecture.vocab_size * target_tokens
    return body + attention + head


def peak_tflops(device_name: str, *, precision: str) -> float | None:
    """Return the dense peak of a GPU in TFLOP/s.

    Args:    device_name: as torch.cuda.get_device_name() gives it, "NVIDIA H100 80GB HBM3".
             precision: of the run, `fp32 | bf16 | fp16`.
    Returns: None for a device that is not in the table, for a slice of one (MIG), and for fp32, whose peak depends on
             whether TF32 is on: a utilisation would be a guess.
    """
    words = set(re.split(r"[\s\-_/]+", device_name))
    if precision == "fp32" or "MIG" in words:
        return None
    return next((peak for name, peak in PEAK_TFLOPS if words.issuperset(name.split())), None)
