"""What matrix products lose at their edges: tiles of the output, in waves over a GPU's multiprocessors.

    C [m, n] = A [m, k] B [k, n]; each multiprocessor makes one tile of C at a time, 256 x 128 numbers

    BLOOM's QKV at TP8, two rows, A100: C [4,096, 5,376], 16 x 42 = 672 tiles on 108 multiprocessors, 6.2 waves: the
    seventh is a quarter full, and takes as long as the others: 7 x 108 / 672 = 1.125 of a product in whole waves

Where tiles are fewer than multiprocessors and k is long, k is cut as well, and the pieces' fp32 sums are added: what
the head of BLOOM-560m hands back of 410 positions, C [410, 1,024], has 16 tiles, k = 250,880, and six pieces of each.
A piece is so long that its operations hide its sums' traffic: 2 k operations take as long as 8 bytes from k = 4 x peak
/ bandwidth on, 612 on an A100.

A linear layer is three products: forward C [tokens, outputs], backward [tokens, inputs] of what came in and
[inputs, outputs] of the weights. Attention that keeps its scores is six, each of all heads at once: forward scores
[query, key] and values [query, head_dim], backward the gradients of scores, values, queries and keys. Four of them have
head_dim columns: heads of 144 fill 1.1 tiles of 128, and take as long as heads of 256.

Source:  NVIDIA, Matrix Multiplication Background User's Guide (DU-09799-001), sections 2.1 (tensor cores want rows that
         begin at multiples of 16 bytes), 2.2 (256 x 128 is the most efficient tile) and 3.2 (wave quantization);
         CUTLASS, "Efficient GEMM in CUDA", "Parallelized Reductions" (k that is cut).
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["TILE", "attention_flops", "linear_flops", "wave_factor"]

TILE = (256, 128)
"""Output numbers of a tile, in either orientation: the one that wastes less."""


@lru_cache(maxsize=65536)
def wave_factor(rows: int, columns: int, *, multiprocessors: int, most_pieces: int = 1) -> float:
    """Return how much longer a product takes than in whole waves of whole tiles; 1 or more.

    Args:    rows, columns: of the output. most_pieces: into how many k may be cut.
    """
    took = []
    for high, wide in (TILE, TILE[::-1]):
        tiles = -(-rows // high) * -(-columns // wide)
        pieces = max(1, min(most_pieces, multiprocessors // tiles))
        waves = -(-tiles * pieces // multiprocessors)
        took.append(waves * multiprocessors * high * wide / pieces)
    return min(took) / (rows * columns)


@lru_cache(maxsize=65536)
def linear_flops(
    tokens: int, inputs: int, outputs: int, *, multiprocessors: int, shortest_piece: int
) -> tuple[float, float, float]:
    """Return the operations of a linear layer, those of idle multiprocessors counted as done.

    Args:    tokens, inputs, outputs: of one rank's shard. shortest_piece: of k, where it is cut.
    Returns: (forward, backward of what came in, backward of the weights).
    """
    if not tokens:
        return 0.0, 0.0, 0.0
    whole = 2.0 * tokens * inputs * outputs
    forward, of_inputs, of_weights = (
        wave_factor(rows, columns, multiprocessors=multiprocessors, most_pieces=depth // shortest_piece)
        for rows, columns, depth in ((tokens, outputs, inputs), (tokens, inputs, outputs), (inputs, outputs, tokens))
    )
    return whole * forward, whole * of_inputs, whole * of_weights


@lru_cache(maxsize=65536)
def attention_flops(
    heads: int, query: int, key: int, head_dim: int, *, multiprocessors: int
) -> tuple[float, float, float]:
    """Return the operations of attention over whole squares, (scores, values, backward), as `linear_flops` does.

    Args:    heads: of one rank, times rows of a micro-batch.
    """
    whole = 2.0 * heads * query * key * head_dim
    scores = wave_factor(heads * query, key, multiprocessors=multiprocessors)
    values, of_keys = (wave_factor(heads * rows, head_dim, multiprocessors=multiprocessors) for rows in (query, key))
    return whole * scores, whole * values, whole * (scores + values + 2 * of_keys)
