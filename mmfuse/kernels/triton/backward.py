"""The backward kernels: `delta`, then the gradient of the queries, then that of keys and values.

The weights are computed again from the saved log-sum-exp, once along the lists of the queries and once along those of
the keys. Every element of a gradient is summed by one program in a fixed order: no atomics, and the same bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfuse.kernels.triton.primitives import (
    dot,
    dot_onto,
    load_columns,
    load_one_hot,
    load_rows,
    place_of,
    seen_bits,
    store_columns,
    store_rows,
)


@triton.jit
def delta_kernel(
    OUT, D_OUT, D_LSE, SHARES, D_SHARES, DELTA, length_q, stride_db, stride_dh, stride_ds,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DELTA `[B, H, Sq]`: out · d_out, and shares · d_shares, less the gradient of the log-sum-exp, if there are.

    One program: R rows.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    line = (sample * tl.num_programs(1) + head).to(tl.int64) * length_q
    D_OUT += sample.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    out = load_rows(OUT + line * D, rows, length_q, D, D, W, True).to(ACC)
    d_out = load_rows(D_OUT, rows, length_q, stride_ds, D, W, True).to(ACC)
    delta = tl.sum(out * d_out, 1)
    if D_SHARES is not None:
        columns = tl.arange(0, 8)
        places, real = (line + rows)[:, None] * 8 + columns[None, :], rows[:, None] < length_q
        shares, d_shares = (
            tl.load(SHARES + places, mask=real, other=0.0),
            tl.load(D_SHARES + places, mask=real, other=0.0),
        )
        delta += tl.sum(shares * d_shares, 1)
    if D_LSE is not None:
        delta -= tl.load(D_LSE + line + rows, mask=rows < length_q, other=0.0)
    tl.store(DELTA + line + rows, delta, mask=rows < length_q)


@triton.jit
def _load_statistics(LSE, DELTA, rows, length_q):
    """(log-sum-exp, delta) of queries; +inf makes every weight of a query 0: of one without keys, or behind the end."""
    lse = tl.load(LSE + rows, mask=rows < length_q, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse), tl.load(DELTA + rows, mask=rows < length_q, other=0.0)


@triton.jit
def _dq_step(dq, d_bias, q, d_out, bias, d_shares, lse, delta, K, V, CLASSES, stride_ks, stride_vs, keys, length_k,
             seen, scale, D: tl.constexpr, W: tl.constexpr, PARTIAL: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add to `dq [R, W]` and `d_bias [R, 16]` what comes through the keys `keys [C]`."""
    k = load_rows(K, keys, length_k, stride_ks, D, W, PARTIAL)
    v = load_rows(V, keys, length_k, stride_vs, D, W, PARTIAL)
    scores = dot(q, tl.trans(k), ACC, PRECISION) * scale
    if CLASSES is not None:
        one_hot = load_one_hot(CLASSES, keys, length_k, k.dtype)
        if bias is not None:
            scores = dot_onto(bias, tl.trans(one_hot), scores, PRECISION)
    if PARTIAL:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.math.exp2(scores - lse[:, None])
    d_weights = dot(d_out, tl.trans(v), ACC, PRECISION)
    if d_shares is not None:
        d_weights = dot_onto(d_shares, tl.trans(one_hot), d_weights, PRECISION)
    d_scores = (weights * (d_weights - delta[:, None])).to(k.dtype)
    if bias is not None:
        d_bias = dot_onto(d_scores, one_hot, d_bias, PRECISION)
    return dot_onto(d_scores, k, dq, PRECISION), d_bias


@triton.jit
def dq_kernel(
    Q, K, V, D_OUT, BIAS, CLASSES, D_SHARES, LSE, DELTA, DQ, D_BIAS,
    ORDER, FULL_OFFSETS, FULL_BLOCKS, PARTIAL_OFFSETS, PARTIAL_BLOCKS, PARTIAL_TILES, WORDS,
    scale, softmax_scale, length_q, length_k, blocks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_ds,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: R queries of one head. `scale` is `softmax_scale` times log2(e)."""
    place, sample, inside, first = place_of(ORDER, blocks, BLOCK_Q, R)
    head = tl.program_id(1)
    rows = first + tl.arange(0, R)
    line = (sample * tl.num_programs(1) + head).to(tl.int64) * length_q
    Q += sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    K += sample.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    V += sample.to(tl.int64) * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    D_OUT += sample.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    q = load_rows(Q, rows, length_q, stride_qs, D, W, True)
    d_out = load_rows(D_OUT, rows, length_q, stride_ds, D, W, True)
    lse, delta = _load_statistics(LSE + line, DELTA + line, rows, length_q)
    dq = tl.zeros([R, W], ACC)
    d_bias = tl.zeros([R, 16], ACC)
    bias = None
    d_shares = None
    if CLASSES is not None:
        CLASSES += sample.to(tl.int64) * length_k
        if BIAS is not None:
            bias = load_columns(BIAS + line * 8, rows, length_q, q.dtype)
        if D_SHARES is not None:
            d_shares = load_columns(D_SHARES + line * 8, rows, length_q, q.dtype)
    STEPS: tl.constexpr = BLOCK_K // C
    for i in range(tl.load(FULL_OFFSETS + place) * STEPS, tl.load(FULL_OFFSETS + place + 1) * STEPS):
        keys = tl.load(FULL_BLOCKS + i // STEPS) * BLOCK_K + (i % STEPS) * C + tl.arange(0, C)
        dq, d_bias = _dq_step(
            dq, d_bias, q, d_out, bias, d_shares, lse, delta, K, V, CLASSES, stride_ks, stride_vs, keys, length_k,
            None, scale, D, W, False, ACC, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(PARTIAL_OFFSETS + place) * STEPS, tl.load(PARTIAL_OFFSETS + place + 1) * STEPS):
        column = (i % STEPS) * C
        keys = tl.load(PARTIAL_BLOCKS + i // STEPS) * BLOCK_K + column + tl.arange(0, C)
        seen = seen_bits(WORDS, tl.load(PARTIAL_TILES + i // STEPS), inside, column, BLOCK_Q, BLOCK_K, R, C)
        dq, d_bias = _dq_step(
            dq, d_bias, q, d_out, bias, d_shares, lse, delta, K, V, CLASSES, stride_ks, stride_vs, keys, length_k,
            seen, scale, D, W, True, ACC, PRECISION,
        )  # fmt: skip
    store_rows(DQ + line * D, rows, length_q, dq * softmax_scale, D, W)
    if BIAS is not None:
        store_columns(D_BIAS + line * 8, rows, length_q, d_bias)


@triton.jit
def _dkv_step(dk, dv, k, v, one_hot, Q, D_OUT, BIAS, D_SHARES, LSE, DELTA, stride_qs, stride_ds, queries, length_q,
              seen, scale, D: tl.constexpr, W: tl.constexpr, PARTIAL: tl.constexpr,
              ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add to `dk`, `dv [R, W]` what comes through the queries `queries [C]`; scores are transposed, `[R, C]`."""
    q = load_rows(Q, queries, length_q, stride_qs, D, W, True)
    d_out = load_rows(D_OUT, queries, length_q, stride_ds, D, W, True)
    lse, delta = _load_statistics(LSE, DELTA, queries, length_q)
    scores = dot(k, tl.trans(q), ACC, PRECISION) * scale
    if BIAS is not None:
        bias = load_columns(BIAS, queries, length_q, k.dtype)
        scores = dot_onto(one_hot, tl.trans(bias), scores, PRECISION)
    if PARTIAL:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.math.exp2(scores - lse[None, :])
    dv = dot_onto(weights.to(d_out.dtype), d_out, dv, PRECISION)
    d_weights = dot(v, tl.trans(d_out), ACC, PRECISION)
    if D_SHARES is not None:
        d_shares = load_columns(D_SHARES, queries, length_q, k.dtype)
        d_weights = dot_onto(one_hot, tl.trans(d_shares), d_weights, PRECISION)
    d_scores = weights * (d_weights - delta[None, :])
    return dot_onto(d_scores.to(q.dtype), q, dk, PRECISION), dv


@triton.jit
def dkv_kernel(
    Q, K, V, D_OUT, BIAS, CLASSES, D_SHARES, LSE, DELTA, DK, DV,
    ORDER, FULL_OFFSETS, FULL_BLOCKS, PARTIAL_OFFSETS, PARTIAL_BLOCKS, PARTIAL_TILES, WORDS,
    scale, softmax_scale, length_q, length_k, blocks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_ds,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: R keys of one key head, and every query head of its group. WORDS are the transposed ones."""
    place, sample, inside, first = place_of(ORDER, blocks, BLOCK_K, R)
    key_head = tl.program_id(1)
    rows = first + tl.arange(0, R)
    K += sample.to(tl.int64) * stride_kb + key_head.to(tl.int64) * stride_kh
    V += sample.to(tl.int64) * stride_vb + key_head.to(tl.int64) * stride_vh
    k = load_rows(K, rows, length_k, stride_ks, D, W, True)
    v = load_rows(V, rows, length_k, stride_vs, D, W, True)
    one_hot = None
    if CLASSES is not None:
        one_hot = load_one_hot(CLASSES + sample.to(tl.int64) * length_k, rows, length_k, k.dtype)
    dk = tl.zeros([R, W], ACC)
    dv = tl.zeros([R, W], ACC)
    STEPS: tl.constexpr = BLOCK_Q // C
    for member in range(GROUP):
        head = key_head * GROUP + member
        line = (sample * tl.num_programs(1) * GROUP + head).to(tl.int64) * length_q
        QH = Q + sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        DH = D_OUT + sample.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
        BH = BIAS
        if BIAS is not None:
            BH = BIAS + line * 8
        SH = D_SHARES
        if D_SHARES is not None:
            SH = D_SHARES + line * 8
        for i in range(tl.load(FULL_OFFSETS + place) * STEPS, tl.load(FULL_OFFSETS + place + 1) * STEPS):
            queries = tl.load(FULL_BLOCKS + i // STEPS) * BLOCK_Q + (i % STEPS) * C + tl.arange(0, C)
            dk, dv = _dkv_step(
                dk, dv, k, v, one_hot, QH, DH, BH, SH, LSE + line, DELTA + line, stride_qs, stride_ds, queries,
                length_q, None, scale, D, W, False, ACC, PRECISION,
            )  # fmt: skip
        for i in range(tl.load(PARTIAL_OFFSETS + place) * STEPS, tl.load(PARTIAL_OFFSETS + place + 1) * STEPS):
            column = (i % STEPS) * C
            queries = tl.load(PARTIAL_BLOCKS + i // STEPS) * BLOCK_Q + column + tl.arange(0, C)
            seen = seen_bits(WORDS, tl.load(PARTIAL_TILES + i // STEPS), inside, column, BLOCK_K, BLOCK_Q, R, C)
            dk, dv = _dkv_step(
                dk, dv, k, v, one_hot, QH, DH, BH, SH, LSE + line, DELTA + line, stride_qs, stride_ds, queries,
                length_q, seen, scale, D, W, True, ACC, PRECISION,
            )  # fmt: skip
    line = (sample * tl.num_programs(1) + key_head).to(tl.int64) * length_k
    store_rows(DK + line * D, rows, length_k, dk * softmax_scale, D, W)
    store_rows(DV + line * D, rows, length_k, dv, D, W)
