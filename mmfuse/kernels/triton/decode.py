"""Split-KV decoding: few queries against many keys, the keys shared out among programs and the parts merged after.

The queries of all heads of a group stand in one matrix, row `member * Sq + query`, so that each key is loaded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfuse.kernels.triton.forward import add_keys


@triton.jit
def _share(START, place, split, SPLITS: tl.constexpr):
    """This program's part of a list."""
    start, stop = tl.load(START + place), tl.load(START + place + 1)
    each = (stop - start + SPLITS - 1) // SPLITS
    return start + split * each, tl.minimum(start + (split + 1) * each, stop)


@triton.jit
def decode_kernel(
    Q, K, V, PART, PART_LSE, FULL_OFFSETS, FULL_BLOCKS, PARTIAL_OFFSETS, PARTIAL_BLOCKS, PARTIAL_TILES, WORDS,
    scale, length_q, length_k,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one share of the keys of one key head; all queries fit one block of the plan.

    PART `[B, Hkv, SPLITS, R, D]` and PART_LSE `[B, Hkv, SPLITS, R]` in log2.
    """
    sample, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, R)
    query = rows % length_q
    live = rows < GROUP * length_q
    columns = tl.arange(0, W)
    Q += sample.to(tl.int64) * stride_qb
    q_rows = (key_head * GROUP + rows // length_q).to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qs
    q = tl.load(Q + q_rows[:, None] + columns[None, :], mask=live[:, None] & (columns[None, :] < D), other=0.0)
    K += sample.to(tl.int64) * stride_kb + key_head.to(tl.int64) * stride_kh
    V += sample.to(tl.int64) * stride_vb + key_head.to(tl.int64) * stride_vh
    out = tl.zeros([R, W], ACC)
    peak = tl.full([R], float("-inf"), ACC)
    total = tl.zeros([R], ACC)
    none = tl.zeros([R, 16], ACC)
    STEPS: tl.constexpr = BLOCK_K // C
    start, stop = _share(FULL_OFFSETS, sample, split, SPLITS)
    for i in range(start * STEPS, stop * STEPS):
        keys = tl.load(FULL_BLOCKS + i // STEPS) * BLOCK_K + (i % STEPS) * C + tl.arange(0, C)
        out, total, peak, _ = add_keys(
            out, total, peak, none, q, None, K, V, None, stride_ks, stride_vs, keys, length_k, live[:, None], scale,
            D, W, True, ACC, PRECISION,
        )  # fmt: skip
    start, stop = _share(PARTIAL_OFFSETS, sample, split, SPLITS)
    for i in range(start * STEPS, stop * STEPS):
        column = (i % STEPS) * C
        keys = tl.load(PARTIAL_BLOCKS + i // STEPS) * BLOCK_K + column + tl.arange(0, C)
        row = tl.load(PARTIAL_TILES + i // STEPS).to(tl.int64) * BLOCK_Q + query
        word = tl.load(WORDS + row * (BLOCK_K // 64) + column // 64)
        bits = (word[:, None] >> (column % 64 + tl.arange(0, C))[None, :].to(tl.int64)) & 1
        seen = (bits != 0) & live[:, None]
        out, total, peak, _ = add_keys(
            out, total, peak, none, q, None, K, V, None, stride_ks, stride_vs, keys, length_k, seen, scale,
            D, W, True, ACC, PRECISION,
        )  # fmt: skip
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    part = ((sample * tl.num_programs(1) + key_head) * SPLITS + split).to(tl.int64) * R + rows
    tl.store(PART + part[:, None] * D + columns[None, :], out / total[:, None], mask=columns[None, :] < D)
    tl.store(PART_LSE + part, tl.where(dead, float("-inf"), peak + tl.math.log2(total)))


@triton.jit
def merge_kernel(
    PART, PART_LSE, MASS, OUT, LSE, length_q,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One program: one query of one head; its parts weighed by what each has of the softmax's denominator."""
    query, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, W)
    row = (head % GROUP) * length_q + query
    part = ((sample * (heads // GROUP) + head // GROUP) * SPLITS + splits).to(tl.int64) * R + row
    part_lse = tl.load(PART_LSE + part)
    peak = tl.max(part_lse, 0)
    if MASS is not None:
        mass = tl.load(MASS + sample * length_q + query)
        peak = tl.maximum(peak, mass)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.math.exp2(part_lse - base)
    total = tl.sum(shares, 0)
    if MASS is not None:
        total += tl.math.exp2(mass - base)
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    parts = tl.load(PART + part[:, None] * D + columns[None, :], mask=columns[None, :] < D, other=0.0)
    out = tl.sum(parts * shares[:, None], 0) / total
    line = (sample * heads + head).to(tl.int64) * length_q + query
    tl.store(OUT + line * D + columns, out.to(OUT.dtype.element_ty), mask=columns < D)
    tl.store(LSE + line, tl.where(dead, float("-inf"), peak + tl.math.log2(total)))
