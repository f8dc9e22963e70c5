"""How large a step each kernel takes and on how many warps, by head dim and width of a number.

The plan says how large its blocks are; a kernel may take a block in parts. The table was chosen among those that
compile without a spilled register for sm_80, sm_90, sm_100 and gfx942; no GPU has measured it.
"""

from __future__ import annotations

from typing import NamedTuple

#: Programs that fill a large GPU; a decoding step splits its keys until there are as many.
_PROGRAMS = 256


class Launch(NamedTuple):
    """`rows` that a program owns, `columns` of each step (at most 64), `warps` and pipeline `stages`."""

    rows: int
    columns: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The next power of two, which is what a tile can have; products on tensor cores want 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def launch_of(kernel: str, head_dim: int, itemsize: int, block_rows: int, block_columns: int) -> Launch:
    """The launch of `kernel` for numbers of `itemsize` bytes, over blocks of that shape."""
    return Launch(min(64, block_rows), min(64, block_columns), 4, 2)


def decode_splits(programs: int, keys: int, block_k: int) -> int:
    """Into how many parts, a power of two, the keys of each of `programs` are split."""
    blocks = -(-keys // block_k)
    splits = 1
    while splits * programs < _PROGRAMS and splits < blocks:
        splits *= 2
    return splits
