"""What matrix products lose at their edges: tiles of the output, in waves over a GPU's multiprocessors.

    C [m, n] = A [m, k] B [k, n]; each multiprocessor makes one tile of C at a time, 256 x 128 numbers

    BLOOM's QKV at TP8, two rows, A100: C [4,096, 5,376], 16 x 42 = 672 tiles on 108 multiprocessors, 6.2 waves: the
    seventh is a quarter full, and takes as long as the others: 7 x 108 / 672 = 1.125 of a product in whole waves

A linear layer is three products: forward C [tokens, outputs], backward [tokens, inputs] of what came in and
[inputs, outputs] of the weights.

Source:  NVIDIA, Matrix Multiplication Background User's Guide (DU-09799-001), sections 2.2 (256 x 128 is the most
         efficient tile) and 3.2 (wave quantization).
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["TILE", "linear_flops", "wave_factor"]

TILE = (256, 128)
"""Output numbers of a tile, in either orientation: the one that wastes less."""


@lru_cache(maxsize=65536)
def wave_factor(rows: int, columns: int, *, multiprocessors: int) -> float:
    """Return how much longer a product takes than in whole waves of whole tiles; 1 or more.

    Args:    rows, columns: of the output.
    """
    took = (
        -(-(-(-rows // high) * -(-columns // wide)) // multiprocessors) * multiprocessors * high * wide
        for high, wide in (TILE, TILE[::-1])
    )
    return min(took) / (rows * columns)


@lru_cache(maxsize=65536)
def linear_flops(tokens: int, inputs: int, outputs: int, *, multiprocessors: int) -> tuple[float, float]:
    """Return the operations of a linear layer, (forward, backward), those of idle multiprocessors counted as done.

    Args:    tokens, inputs, outputs: of one rank's shard.
    """
    if not tokens:
        return 0.0, 0.0
    whole = 2.0 * tokens * inputs * outputs
    forward = whole * wave_factor(tokens, outputs, multiprocessors=multiprocessors)
    backward = whole * (
        wave_factor(tokens, inputs, multiprocessors=multiprocessors)
        + wave_factor(inputs, outputs, multiprocessors=multiprocessors)
    )
    return forward, backward
