"""Attention of one block of queries, in Triton: the forward kernel.

Legend:  b micro-batch, n heads of this rank, q and k queries and keys of a row, d head_dim; m rows of a block of
         queries, c columns of a block of keys.

    scores = scale * q k^T + bias     in units of log2(e), so that exp2 does what exp would
    bias     slope * (key - last key seen)     ALiBi, "alibi"; in a causal row that is slope * (key - query)
             table[key - query + L - 1]        T5's learned bias by distance, "relative"
    one block of queries visits the blocks of keys that one of its queries sees, with a running maximum, sum of
    exponentials and context in fp32 (online softmax); it saves log2(sum of exp2(scores)) for the backward pass

                  keys  |partly seen| all seen | all seen |partly seen|      only the outer ones are masked

ALiBi's distances are integers in fp32, exact at any place in the row. They count from the last key that a query sees,
which softmax cannot tell from the query itself: under prefix-LM, where later keys are seen, their bias would be large
and positive, and cost the exponent its last digits.
Source:  Dao 2023, "FlashAttention-2", algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BIAS_PADDING",
    "attention_forward",
    "biased_scores",
    "dropout_factor",
    "head_bias",
    "load_rows",
    "row_pointers",
    "store_rows",
]

NOTHING_SEEN = tl.constexpr(-1.0e30)
"""Running maximum of a query that has seen no key. -inf would turn exp2(-inf - -inf) into no number."""

BIAS_PADDING = tl.constexpr(128)
"""Numbers behind each row of the bias, which nobody sees: as many as the largest block has keys."""


@triton.jit
def row_pointers(base, first, stride, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Point at rows first, first + 1 ... of [s, ..., d]: [LENGTH, BLOCK_D]; rows times stride need 64 bits."""
    rows, columns = tl.cast(first, tl.int64) + tl.arange(0, LENGTH), tl.arange(0, BLOCK_D)
    return base + rows[:, None] * stride + columns[None, :]


@triton.jit
def load_rows(base, first, stride, length, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of [s, ..., d], 0 beyond its length and head_dim: [LENGTH, BLOCK_D]."""
    inside = (first + tl.arange(0, LENGTH) < length)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return tl.load(row_pointers(base, first, stride, HEAD_DIM, LENGTH, BLOCK_D), mask=inside, other=0.0)


@triton.jit
def store_rows(
    base, values, first, stride, length, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store [LENGTH, BLOCK_D] as rows of [s, ..., d], cast to its type."""
    inside = (first + tl.arange(0, LENGTH) < length)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    pointers = row_pointers(base, first, stride, HEAD_DIM, LENGTH, BLOCK_D)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def head_bias(bias_ptr, head, longest, BIAS: tl.constexpr):
    """Return what `biased_scores` takes as bias: a slope, a pointer, or nothing."""
    if BIAS == "alibi":
        return tl.load(bias_ptr + head)
    elif BIAS == "relative":
        return bias_ptr + head * (2 * longest - 1 + BIAS_PADDING)
    else:
        return 0.0


@triton.jit
def biased_scores(
    products, query, last_key, key, bias, longest, visible, scale, BIAS: tl.constexpr, MASKED: tl.constexpr
):
    """Return scores in units of log2(e) out of products q k^T, -inf where `visible` is not.

    Args:  query, last_key, key: int32 places that broadcast to the shape of products; last_key: that a query sees.
           bias: the head's slope, or pointer to its row of 2 longest - 1 numbers.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    scores = products * (scale * LOG2_E)
    if BIAS == "alibi":
        scores += (bias * LOG2_E) * (key.to(tl.float32) - last_key.to(tl.float32))
    if BIAS == "relative":
        # Unmasked: a key beyond the row, by less than a block, falls into the table's padding.
        of_query = bias + (longest - 1 - query)
        scores += LOG2_E * tl.load(of_query + key)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def dropout_factor(seed, row, head, query, key, dropout):
    """Return 0 with probability `dropout`, else 1 / (1 - dropout): a pure function of seed, row, head, query, key.

    Source:  Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Philox 4x32, 7 rounds pass BigCrush.
    """
    zero = (query + key) * 0
    drawn, _, _, _ = tl.philox(seed, query + zero, key + zero, head + zero, row + zero, 7)
    # 24 bits, so that every value is a float; kept if not below the share that is dropped.
    uniform = (drawn >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _visit_keys(
    context,
    largest,
    total,
    queries,
    key_base,
    value_base,
    stride_key,
    stride_value,
    query,
    key_begin,
    key_end,
    first,
    last,
    num_keys,
    bias,
    longest,
    scale,
    seed,
    dropout,
    row,
    head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to the blocks of keys in [first, last): context [m, d], largest and total [m], returned anew."""
    last_key = key_end - 1
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = load_rows(key_base, start, stride_key, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        visible = (key[None, :] >= key_begin[:, None]) & (key[None, :] < key_end[:, None])
        scores = biased_scores(
            products, query[:, None], last_key[:, None], key[None, :], bias, longest, visible, scale, BIAS, MASKED
        )
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if DROPS:
            weights *= dropout_factor(seed, row, head, query[:, None], key[None, :], dropout)
        values = load_rows(value_base, start, stride_value, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
        context = context * shrink[:, None]
        context = tl.dot(weights.to(values.dtype), values, context, input_precision=PRECISION)
        largest = larger
    return context, largest, total


@triton.jit
def attention_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    context_ptr,
    log_sum_ptr,
    key_begin_ptr,
    key_end_ptr,
    bias_ptr,
    seed_ptr,
    stride_qs,
    stride_qb,
    stride_qn,
    stride_ks,
    stride_kb,
    stride_kn,
    stride_vs,
    stride_vb,
    stride_vn,
    stride_cs,
    stride_cb,
    stride_cn,
    num_queries,
    num_keys,
    longest,
    scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend for one block of queries of one head of one row; grid (blocks of queries, heads, rows).

    Args:  query, context: [q, b, n, d]. key, value: [k, b, n, d], strides but that of d, which is 1.
           log_sum: fp32 [b, n, q]. key_begin, key_end: int32 [b, q]. bias: slopes fp32 [n], or
           fp32 [n, 2 longest - 1 + BIAS_PADDING]. seed: int64 [1], read where DROPS.
    """
    # The last block of a long segment has most keys, and is started first.
    block, head, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_long, row_long = head.to(tl.int64), row.to(tl.int64)
    first = block * BLOCK_M
    is_query = first + tl.arange(0, BLOCK_M) < num_queries
    # Those beyond the sequence stand in the last place, so that no bias is read beyond its table.
    query = tl.minimum(first + tl.arange(0, BLOCK_M), num_queries - 1)
    bounds = row_long * num_queries + query
    key_begin = tl.load(key_begin_ptr + bounds, mask=is_query, other=num_keys)
    key_end = tl.load(key_end_ptr + bounds, mask=is_query, other=0)
    begin, end = tl.min(key_begin) // BLOCK_N * BLOCK_N, tl.max(key_end)
    # Between these, every query sees every key: (rows beyond the sequence see what the others see).
    full_begin = tl.cdiv(tl.max(tl.where(is_query, key_begin, 0)), BLOCK_N) * BLOCK_N
    full_end = tl.min(tl.where(is_query, key_end, num_keys)) // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(full_begin, tl.maximum(begin, end))
    full_end = tl.maximum(tl.minimum(full_end, end), full_begin)

    query_base = query_ptr + row_long * stride_qb + head_long * stride_qn
    key_base = key_ptr + row_long * stride_kb + head_long * stride_kn
    value_base = value_ptr + row_long * stride_vb + head_long * stride_vn
    queries = load_rows(query_base, first, stride_qs, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
    bias, seed = head_bias(bias_ptr, head, longest, BIAS), 0
    if DROPS:
        seed = tl.load(seed_ptr)

    context = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(3):
        part_begin = begin if part == 0 else (full_begin if part == 1 else full_end)
        part_end = full_begin if part == 0 else (full_end if part == 1 else end)
        context, largest, total = _visit_keys(
            context,
            largest,
            total,
            queries,
            key_base,
            value_base,
            stride_ks,
            stride_vs,
            query,
            key_begin,
            key_end,
            part_begin,
            part_end,
            num_keys,
            bias,
            longest,
            scale,
            seed,
            dropout,
            row,
            head,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BIAS,
            DROPS,
            part != 1,
            PRECISION,
        )
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    context_base = context_ptr + row_long * stride_cb + head_long * stride_cn
    store_rows(context_base, context / total[:, None], first, stride_cs, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
    log_sums = tl.where(sees, largest + tl.log2(total), 0.0)
    offsets = (row_long * tl.num_programs(1) + head_long) * num_queries + query
    tl.store(log_sum_ptr + offsets, log_sums, mask=is_query)
