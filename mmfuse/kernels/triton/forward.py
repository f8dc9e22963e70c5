"""The forward kernel: softmax in one pass over the blocks that the plan lists for each block of queries."""

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
def add_keys(out, total, peak, shares, q, bias, K, V, CLASSES, stride_ks, stride_vs, keys, length_k, seen, scale,
             D: tl.constexpr, W: tl.constexpr, PARTIAL: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the keys `keys [C]` to the running softmax: `out [R, W]`, its denominator `total [R]`, its maximum `peak`.

    With CLASSES, the classes of the keys: `bias [R, 16]` is added by class, and `shares [R, 16]` sum the weights.
    """
    k = load_rows(K, keys, length_k, stride_ks, D, W, PARTIAL)
    scores = dot(q, tl.trans(k), ACC, PRECISION) * scale
    if CLASSES is not None:
        one_hot = load_one_hot(CLASSES, keys, length_k, k.dtype)
        if bias is not None:
            scores = dot_onto(bias, tl.trans(one_hot), scores, PRECISION)
    if PARTIAL:
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # Of a row that has seen nothing yet the maximum is -inf, and -inf - -inf is no number.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if PARTIAL else new_peak
    weights = tl.math.exp2(scores - base[:, None])
    fade = tl.math.exp2(peak - base)
    v = load_rows(V, keys, length_k, stride_vs, D, W, PARTIAL)
    out = dot_onto(weights.to(v.dtype), v, out * fade[:, None], PRECISION)
    if CLASSES is not None:
        shares = dot_onto(weights.to(k.dtype), one_hot, shares * fade[:, None], PRECISION)
    return out, total * fade + tl.sum(weights, 1), new_peak, shares


@triton.jit
def forward_kernel(
    Q, K, V, MASS, BIAS, CLASSES, OUT, LSE, SHARES,
    ORDER, FULL_OFFSETS, FULL_BLOCKS, PARTIAL_OFFSETS, PARTIAL_BLOCKS, PARTIAL_TILES, WORDS,
    scale, length_q, length_k, blocks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: R queries of one head. `scale` includes log2(e); LSE `[B, H, Sq]` and MASS `[B, Sq]` are in log2.

    With CLASSES `[B, Sk]`: BIAS `[B, H, Sq, 8]` in log2 (or none), and SHARES of the same shape are written.
    """
    place, sample, inside, first = place_of(ORDER, blocks, BLOCK_Q, R)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    rows = first + tl.arange(0, R)
    K += sample.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    V += sample.to(tl.int64) * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    Q += sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = load_rows(Q, rows, length_q, stride_qs, D, W, True)
    out = tl.zeros([R, W], ACC)
    line = (sample * heads + head).to(tl.int64) * length_q
    shares = tl.zeros([R, 16], ACC)
    bias = None
    if CLASSES is not None:
        CLASSES += sample.to(tl.int64) * length_k
        if BIAS is not None:
            bias = load_columns(BIAS + line * 8, rows, length_q, q.dtype)
    if MASS is not None:
        # The mass is one more key, with that score and value 0, and comes first.
        peak = tl.load(MASS + sample * length_q + rows, mask=rows < length_q, other=float("-inf")).to(ACC)
        total = tl.where(peak == float("-inf"), 0.0, 1.0).to(ACC)
    else:
        peak = tl.full([R], float("-inf"), ACC)
        total = tl.zeros([R], ACC)
    STEPS: tl.constexpr = BLOCK_K // C
    for i in range(tl.load(FULL_OFFSETS + place) * STEPS, tl.load(FULL_OFFSETS + place + 1) * STEPS):
        keys = tl.load(FULL_BLOCKS + i // STEPS) * BLOCK_K + (i % STEPS) * C + tl.arange(0, C)
        out, total, peak, shares = add_keys(
            out, total, peak, shares, q, bias, K, V, CLASSES, stride_ks, stride_vs, keys, length_k, None, scale,
            D, W, False, ACC, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(PARTIAL_OFFSETS + place) * STEPS, tl.load(PARTIAL_OFFSETS + place + 1) * STEPS):
        column = (i % STEPS) * C
        keys = tl.load(PARTIAL_BLOCKS + i // STEPS) * BLOCK_K + column + tl.arange(0, C)
        seen = seen_bits(WORDS, tl.load(PARTIAL_TILES + i // STEPS), inside, column, BLOCK_Q, BLOCK_K, R, C)
        out, total, peak, shares = add_keys(
            out, total, peak, shares, q, bias, K, V, CLASSES, stride_ks, stride_vs, keys, length_k, seen, scale,
            D, W, True, ACC, PRECISION,
        )  # fmt: skip
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    store_rows(OUT + line * D, rows, length_q, out / total[:, None], D, W)
    if CLASSES is not None:
        store_columns(SHARES + line * 8, rows, length_q, shares / total[:, None])
    lse = tl.where(dead, float("-inf"), peak + tl.math.log2(total))
    tl.store(LSE + line + rows, lse, mask=rows < length_q)
