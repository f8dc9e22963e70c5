"""What the kernels share: matrix products, rows of a matrix, bit tiles, and the place of a program in the plan.

Legend of the kernels: `R` rows that a program owns, `C` columns that it looks at in one step, `D` the head dim and `W`
the same padded to a power of two. Pointers are in capitals, and so are compile-time constants.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Whether the kernels run as Python on CPU tensors; triton reads the same variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b` with sums in ACC.

    The interpreter multiplies the bit patterns of bf16 as if they were integers, and says nothing: it is given wider
    operands, whose products are exact.
    """
    if _UPCAST:
        return tl.dot(a.to(ACC), b.to(ACC), out_dtype=ACC, input_precision="ieee")
    return tl.dot(a, b, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def dot_onto(a, b, onto, PRECISION: tl.constexpr):
    """`onto + a @ b`, as `dot`."""
    if _UPCAST:
        return tl.dot(a.to(onto.dtype), b.to(onto.dtype), onto, input_precision="ieee")
    return tl.dot(a, b, onto, input_precision=PRECISION)


@triton.jit
def load_rows(X, rows, length, stride, D: tl.constexpr, W: tl.constexpr, CHECK: tl.constexpr):
    """`[len(rows), W]` of the matrix X: 0 from column D on, and with CHECK from row `length` on."""
    columns = tl.arange(0, W)
    pointers = X + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if CHECK:
        return tl.load(pointers, mask=(rows[:, None] < length) & (columns[None, :] < D), other=0.0)
    if D == W:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns[None, :] < D, other=0.0)


@triton.jit
def store_rows(X, rows, length, values, D: tl.constexpr, W: tl.constexpr):
    """Write `values [len(rows), W]` into a matrix of D columns without gaps."""
    columns = tl.arange(0, W)
    pointers = X + rows[:, None].to(tl.int64) * D + columns[None, :]
    tl.store(pointers, values.to(X.dtype.element_ty), mask=(rows[:, None] < length) & (columns[None, :] < D))


@triton.jit
def load_columns(X, rows, length, dtype: tl.constexpr):
    """`[len(rows), 16]` of a matrix X of 8 columns in two parts, coarse and fine, whose sum 16 bits do not round."""
    columns = tl.arange(0, 16)
    pointers = X + rows[:, None].to(tl.int64) * 8 + columns[None, :] % 8
    whole = tl.load(pointers, mask=rows[:, None] < length, other=0.0)
    coarse = whole.to(dtype).to(whole.dtype)
    return tl.where(columns[None, :] < 8, coarse, whole - coarse).to(dtype)


@triton.jit
def load_one_hot(CLASSES, rows, length, dtype: tl.constexpr):
    """`[len(rows), 16]`: the one-hot class of each row twice; nothing from row `length` on."""
    classes = tl.load(CLASSES + rows, mask=rows < length, other=-1)
    # The interpreter would write an integer where a bool becomes a bfloat16.
    return tl.where(classes[:, None] == tl.arange(0, 16)[None, :] % 8, 1.0, 0.0).to(tl.float32).to(dtype)


@triton.jit
def store_columns(X, rows, length, values):
    """Write the first 8 columns of `values [len(rows), 16]`."""
    columns = tl.arange(0, 16)
    pointers = X + rows[:, None].to(tl.int64) * 8 + columns[None, :]
    tl.store(pointers, values, mask=(rows[:, None] < length) & (columns[None, :] < 8))


@triton.jit
def seen_bits(WORDS, tile, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """bool `[R, C]`: the part of a ROWS × COLUMNS bit tile from (first_row, first_column) on; C is at most 64."""
    row = tile.to(tl.int64) * ROWS + first_row + tl.arange(0, R)
    word = tl.load(WORDS + row * (COLUMNS // 64) + first_column // 64)
    if C == 64:
        return ((word[:, None] >> tl.arange(0, C)[None, :].to(tl.int64)) & 1) != 0
    # Shifts of 64-bit integers cost several instructions each: one a row, and narrow ones from there.
    narrow = (word >> (first_column % 64).to(tl.int64)).to(tl.int32)
    return ((narrow[:, None] >> tl.arange(0, C)[None, :]) & 1) != 0


@triton.jit
def place_of(ORDER, blocks, BLOCK: tl.constexpr, R: tl.constexpr):
    """(place in the lists, sample, first row in the block, first row in the sequence) of this program."""
    program = tl.program_id(0)
    place = tl.load(ORDER + program // (BLOCK // R))
    inside = (program % (BLOCK // R)) * R
    return place, place // blocks, inside, (place % blocks) * BLOCK + inside
