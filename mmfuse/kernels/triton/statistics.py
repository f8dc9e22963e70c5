"""The kernel of row statistics: how sharp a softmax is, its largest score and its shares by class. It reads no values.

One pass over the lists of the forward pass. Sums are kept relative to the running maximum, so that the entropy of a
sharp row is no difference of large numbers. Numbers are in units of log2 inside, as in the other kernels.
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
)


@triton.jit
def count_keys(total, moment, peak, shares, q, bias, K, CLASSES, stride_ks, keys, length_k, seen, scale,
               D: tl.constexpr, W: tl.constexpr, PARTIAL: tl.constexpr,
               ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the keys `keys [C]` to the sums of weights `total [R]` and of weights times (score - peak) `moment [R]`."""
    k = load_rows(K, keys, length_k, stride_ks, D, W, PARTIAL)
    one_hot = load_one_hot(CLASSES, keys, length_k, k.dtype)
    scores = dot(q, tl.trans(k), ACC, PRECISION) * scale
    if bias is not None:
        scores = dot_onto(bias, tl.trans(one_hot), scores, PRECISION)
    if PARTIAL:
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if PARTIAL else new_peak
    below = scores - base[:, None]
    weights = tl.math.exp2(below)
    fade = tl.math.exp2(peak - base)
    # The moment is of distances to the peak, which all grow with it. Nothing was summed under a peak of -inf.
    step = tl.where(peak == float("-inf"), 0.0, peak - base)
    if PARTIAL:
        below = tl.where(seen, below, 0.0)
    moment = (moment + total * step) * fade + tl.sum(weights * below, 1)
    shares = dot_onto(weights.to(k.dtype), one_hot, shares * fade[:, None], PRECISION)
    return total * fade + tl.sum(weights, 1), moment, new_peak, shares


@triton.jit
def statistics_kernel(
    Q, K, MASS, BIAS, CLASSES, SHARES, ENTROPY, PEAK,
    ORDER, FULL_OFFSETS, FULL_BLOCKS, PARTIAL_OFFSETS, PARTIAL_BLOCKS, PARTIAL_TILES, WORDS,
    scale, length_q, length_k, blocks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: R queries of one head. Writes SHARES `[B, H, Sq, 8]`, ENTROPY and PEAK `[B, H, Sq]` in log2."""
    place, sample, inside, first = place_of(ORDER, blocks, BLOCK_Q, R)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    rows = first + tl.arange(0, R)
    K += sample.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    Q += sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    CLASSES += sample.to(tl.int64) * length_k
    q = load_rows(Q, rows, length_q, stride_qs, D, W, True)
    line = (sample * heads + head).to(tl.int64) * length_q
    bias = None
    if BIAS is not None:
        bias = load_columns(BIAS + line * 8, rows, length_q, q.dtype)
    shares = tl.zeros([R, 16], ACC)
    total = tl.zeros([R], ACC)
    moment = tl.zeros([R], ACC)
    peak = tl.full([R], float("-inf"), ACC)
    STEPS: tl.constexpr = BLOCK_K // C
    for i in range(tl.load(FULL_OFFSETS + place) * STEPS, tl.load(FULL_OFFSETS + place + 1) * STEPS):
        keys = tl.load(FULL_BLOCKS + i // STEPS) * BLOCK_K + (i % STEPS) * C + tl.arange(0, C)
        total, moment, peak, shares = count_keys(
            total, moment, peak, shares, q, bias, K, CLASSES, stride_ks, keys, length_k, None, scale,
            D, W, False, ACC, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(PARTIAL_OFFSETS + place) * STEPS, tl.load(PARTIAL_OFFSETS + place + 1) * STEPS):
        column = (i % STEPS) * C
        keys = tl.load(PARTIAL_BLOCKS + i // STEPS) * BLOCK_K + column + tl.arange(0, C)
        seen = seen_bits(WORDS, tl.load(PARTIAL_TILES + i // STEPS), inside, column, BLOCK_Q, BLOCK_K, R, C)
        total, moment, peak, shares = count_keys(
            total, moment, peak, shares, q, bias, K, CLASSES, stride_ks, keys, length_k, seen, scale,
            D, W, True, ACC, PRECISION,
        )  # fmt: skip
    dead = total == 0.0
    top = tl.where(dead, 0.0, peak)
    # The logarithm of the denominator, less the peak. A mass may be far larger than any score.
    rest = tl.math.log2(tl.where(dead, 1.0, total))
    if MASS is not None:
        mass = tl.load(MASS + sample * length_q + rows, mask=rows < length_q, other=float("-inf")).to(ACC) - top
        larger = tl.maximum(rest, mass)
        rest = larger + tl.math.log2(tl.math.exp2(rest - larger) + tl.math.exp2(mass - larger))
    weight = tl.math.exp2(-rest)
    store_columns(SHARES + line * 8, rows, length_q, shares * weight[:, None])
    tl.store(ENTROPY + line + rows, (rest * total - moment) * weight, mask=rows < length_q)
    tl.store(PEAK + line + rows, peak, mask=rows < length_q)
