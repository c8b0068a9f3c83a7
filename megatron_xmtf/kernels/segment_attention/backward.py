"""Gradients of attention in Triton: of queries, of keys and values, and of the learned bias, each without atomics.

    p  = exp2(scores - log_sum)                     computed again from q and k, never stored
    dv = p^T do        ds = p (do v^T - delta)      delta = sum over d of do * context = sum over keys of p (do v^T)
    dq = scale ds k    dk = scale ds^T q            dbias[distance] = sum of ds along its diagonal

Three kernels, each owning what it writes, so that equal inputs give equal bits: a block of queries goes through the
keys it sees; a block of keys through the queries that see it; and for the bias all blocks on one diagonal of blocks
have the same distances, so their ds are added up in registers, and the sum's own diagonals are taken once at the end.

    blocks of keys     0    1    2                    distances of diagonal +1, blocks of 64:  1 - 63 ... 127
    queries 0          .    x    .
            1          .    .    x        diagonal +1 is one program of `bias_gradient` for each row and head

Legend as in `forward.py`. Source:  Dao 2023, "FlashAttention-2", algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_xmtf.kernels.segment_attention.forward import (
    biased_scores,
    dropout_factor,
    head_bias,
    load_rows,
    store_rows,
)

__all__ = ["bias_gradient", "key_value_gradient", "query_gradient"]


@triton.jit
def query_gradient(
    query_ptr,
    key_ptr,
    value_ptr,
    context_ptr,
    of_context_ptr,
    of_query_ptr,
    log_sum_ptr,
    delta_ptr,
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
    stride_os,
    stride_ob,
    stride_on,
    stride_gs,
    stride_gb,
    stride_gn,
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
    """Compute dq [q, b, n, d] (strides g) and delta fp32 [b, n, q] of one block of queries; grid as the forward's."""
    block, head, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_long, row_long = head.to(tl.int64), row.to(tl.int64)
    first = block * BLOCK_M
    is_query = first + tl.arange(0, BLOCK_M) < num_queries
    query = tl.minimum(first + tl.arange(0, BLOCK_M), num_queries - 1)
    bounds = row_long * num_queries + query
    key_begin = tl.load(key_begin_ptr + bounds, mask=is_query, other=num_keys)
    key_end = tl.load(key_end_ptr + bounds, mask=is_query, other=0)
    query_base = query_ptr + row_long * stride_qb + head_long * stride_qn
    key_base = key_ptr + row_long * stride_kb + head_long * stride_kn
    value_base = value_ptr + row_long * stride_vb + head_long * stride_vn
    context_base = context_ptr + row_long * stride_cb + head_long * stride_cn
    of_context_base = of_context_ptr + row_long * stride_ob + head_long * stride_on
    queries = load_rows(query_base, first, stride_qs, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
    of_context = load_rows(of_context_base, first, stride_os, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
    context = load_rows(context_base, first, stride_cs, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
    offsets = (row_long * tl.num_programs(1) + head_long) * num_queries + query
    log_sum = tl.load(log_sum_ptr + offsets, mask=is_query, other=0.0)
    bias, seed = head_bias(bias_ptr, head, longest, BIAS), 0
    if DROPS:
        seed = tl.load(seed_ptr)
    begin, end, last_key = tl.min(key_begin) // BLOCK_N * BLOCK_N, tl.max(key_end), key_end - 1

    of_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if BIAS != "relative":
        delta += tl.sum(of_context.to(tl.float32) * context.to(tl.float32), axis=1)
    # A learned bias adds ds up over the whole row; there the rounding of a context in half precision would show, and
    # delta is added up from the weights themselves, in a turn of its own.
    for turn in tl.static_range(0 if BIAS == "relative" else 1, 2):
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            keys = load_rows(key_base, start, stride_ks, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            visible = (key[None, :] >= key_begin[:, None]) & (key[None, :] < key_end[:, None])
            scores = biased_scores(
                products, query[:, None], last_key[:, None], key[None, :], bias, longest, visible, scale, BIAS, True
            )
            probabilities = tl.exp2(scores - log_sum[:, None])
            values = load_rows(value_base, start, stride_vs, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
            of_weights = tl.dot(of_context, tl.trans(values), input_precision=PRECISION)
            if DROPS:
                of_weights *= dropout_factor(seed, row, head, query[:, None], key[None, :], dropout)
            if turn == 0:
                delta += tl.sum(probabilities * of_weights, axis=1)
            else:
                of_scores = probabilities * (of_weights - delta[:, None])
                of_query = tl.dot(of_scores.to(keys.dtype), keys, of_query, input_precision=PRECISION)
    tl.store(delta_ptr + offsets, delta, mask=is_query)
    of_query_base = of_query_ptr + row_long * stride_gb + head_long * stride_gn
    store_rows(of_query_base, of_query * scale, first, stride_gs, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def key_value_gradient(
    query_ptr,
    key_ptr,
    value_ptr,
    of_context_ptr,
    of_key_ptr,
    of_value_ptr,
    log_sum_ptr,
    delta_ptr,
    key_begin_ptr,
    key_end_ptr,
    query_begin_ptr,
    query_end_ptr,
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
    stride_os,
    stride_ob,
    stride_on,
    stride_gks,
    stride_gkb,
    stride_gkn,
    stride_gvs,
    stride_gvb,
    stride_gvn,
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
    """Compute dk and dv [k, b, n, d] of one block of keys; grid (blocks of keys, heads, rows)."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_long, row_long = head.to(tl.int64), row.to(tl.int64)
    first = block * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    key_bounds = row_long * num_keys + key
    query_begin = tl.load(query_begin_ptr + key_bounds, mask=key < num_keys, other=num_queries)
    query_end = tl.load(query_end_ptr + key_bounds, mask=key < num_keys, other=0)
    query_base = query_ptr + row_long * stride_qb + head_long * stride_qn
    key_base = key_ptr + row_long * stride_kb + head_long * stride_kn
    value_base = value_ptr + row_long * stride_vb + head_long * stride_vn
    of_context_base = of_context_ptr + row_long * stride_ob + head_long * stride_on
    keys = load_rows(key_base, first, stride_ks, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    values = load_rows(value_base, first, stride_vs, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    bias, seed = head_bias(bias_ptr, head, longest, BIAS), 0
    if DROPS:
        seed = tl.load(seed_ptr)

    of_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offsets_base = (row_long * tl.num_programs(1) + head_long) * num_queries
    for start in range(tl.min(query_begin) // BLOCK_M * BLOCK_M, tl.max(query_end), BLOCK_M):
        is_query = start + tl.arange(0, BLOCK_M) < num_queries
        query = tl.minimum(start + tl.arange(0, BLOCK_M), num_queries - 1)
        key_begin = tl.load(key_begin_ptr + row_long * num_queries + query, mask=is_query, other=num_keys)
        key_end = tl.load(key_end_ptr + row_long * num_queries + query, mask=is_query, other=0)
        log_sum = tl.load(log_sum_ptr + offsets_base + query, mask=is_query, other=0.0)
        delta = tl.load(delta_ptr + offsets_base + query, mask=is_query, other=0.0)
        queries = load_rows(query_base, start, stride_qs, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
        # Everything transposed, [c, m], so that both gradients are products of a block with what is in memory.
        products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        visible = (key[:, None] >= key_begin[None, :]) & (key[:, None] < key_end[None, :])
        last_key = key_end - 1
        scores = biased_scores(
            products, query[None, :], last_key[None, :], key[:, None], bias, longest, visible, scale, BIAS, True
        )
        probabilities = tl.exp2(scores - log_sum[None, :])
        of_context = load_rows(of_context_base, start, stride_os, num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
        of_weights = tl.dot(values, tl.trans(of_context), input_precision=PRECISION)
        weights = probabilities
        if DROPS:
            factor = dropout_factor(seed, row, head, query[None, :], key[:, None], dropout)
            weights, of_weights = weights * factor, of_weights * factor
        of_values = tl.dot(weights.to(of_context.dtype), of_context, of_values, input_precision=PRECISION)
        of_scores = probabilities * (of_weights - delta[None, :])
        of_keys = tl.dot(of_scores.to(queries.dtype), queries, of_keys, input_precision=PRECISION)
    of_key_base = of_key_ptr + row_long * stride_gkb + head_long * stride_gkn
    of_value_base = of_value_ptr + row_long * stride_gvb + head_long * stride_gvn
    store_rows(of_key_base, of_keys * scale, first, stride_gks, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(of_value_base, of_values, first, stride_gvs, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def bias_gradient(
    query_ptr,
    key_ptr,
    value_ptr,
    of_context_ptr,
    of_bias_ptr,
    log_sum_ptr,
    delta_ptr,
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
    stride_os,
    stride_ob,
    stride_on,
    num_queries,
    num_keys,
    longest,
    scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add ds up along one diagonal of blocks; grid (diagonals, heads, rows).

    Writes [b, n, diagonals, 2 BLOCK] to of_bias, fp32: the sum of each distance from diagonal * BLOCK - BLOCK on, where
    diagonals are counted from that of the last block of queries with the first of keys.
    """
    head, row = tl.program_id(1), tl.program_id(2)
    head_long, row_long = head.to(tl.int64), row.to(tl.int64)
    query_blocks, key_blocks = tl.cdiv(num_queries, BLOCK), tl.cdiv(num_keys, BLOCK)
    diagonal = tl.program_id(0) - (query_blocks - 1)
    query_base = query_ptr + row_long * stride_qb + head_long * stride_qn
    key_base = key_ptr + row_long * stride_kb + head_long * stride_kn
    value_base = value_ptr + row_long * stride_vb + head_long * stride_vn
    of_context_base = of_context_ptr + row_long * stride_ob + head_long * stride_on
    bias, seed = head_bias(bias_ptr, head, longest, "relative"), 0
    if DROPS:
        seed = tl.load(seed_ptr)

    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    offsets_base = (row_long * tl.num_programs(1) + head_long) * num_queries
    for block in range(tl.maximum(0, -diagonal), tl.minimum(query_blocks, key_blocks - diagonal)):
        start, key_start = block * BLOCK, (block + diagonal) * BLOCK
        is_query = start + tl.arange(0, BLOCK) < num_queries
        query = tl.minimum(start + tl.arange(0, BLOCK), num_queries - 1)
        key_begin = tl.load(key_begin_ptr + row_long * num_queries + query, mask=is_query, other=num_keys)
        key_end = tl.load(key_end_ptr + row_long * num_queries + query, mask=is_query, other=0)
        if (tl.min(key_begin) < key_start + BLOCK) & (tl.max(key_end) > key_start):
            key = key_start + tl.arange(0, BLOCK)
            log_sum = tl.load(log_sum_ptr + offsets_base + query, mask=is_query, other=0.0)
            delta = tl.load(delta_ptr + offsets_base + query, mask=is_query, other=0.0)
            queries = load_rows(query_base, start, stride_qs, num_queries, HEAD_DIM, BLOCK, BLOCK_D)
            keys = load_rows(key_base, key_start, stride_ks, num_keys, HEAD_DIM, BLOCK, BLOCK_D)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            visible = (key[None, :] >= key_begin[:, None]) & (key[None, :] < key_end[:, None])
            scores = biased_scores(
                products, query[:, None], query[:, None], key[None, :], bias, longest, visible, scale, "relative", True
            )
            probabilities = tl.exp2(scores - log_sum[:, None])
            of_context = load_rows(of_context_base, start, stride_os, num_queries, HEAD_DIM, BLOCK, BLOCK_D)
            values = load_rows(value_base, key_start, stride_vs, num_keys, HEAD_DIM, BLOCK, BLOCK_D)
            of_weights = tl.dot(of_context, tl.trans(values), input_precision=PRECISION)
            if DROPS:
                of_weights *= dropout_factor(seed, row, head, query[:, None], key[None, :], dropout)
            total += probabilities * (of_weights - delta[:, None])
    # Column c of row m is distance c - m: turned by m to the left, column c holds distance c, or c - BLOCK where the
    # row came round its end.
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    turned = tl.gather(total, (columns + rows) % BLOCK, axis=1)
    is_before = columns + rows >= BLOCK
    output = ((row_long * tl.num_programs(1) + head_long) * tl.num_programs(0) + tl.program_id(0)) * (2 * BLOCK)
    place = tl.arange(0, BLOCK)
    tl.store(of_bias_ptr + output + place, tl.sum(tl.where(is_before, turned, 0.0), axis=0))
    tl.store(of_bias_ptr + output + BLOCK + place, tl.sum(tl.where(is_before, 0.0, turned), axis=0))
