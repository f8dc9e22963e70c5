"""How large a step each kernel takes and on how many warps, by head dim and vendor.

The plan says how large its blocks are, at least 64 × 64; a kernel may take a block in parts. The tables were chosen
among the shapes that compile without a spilled register for sm_80, sm_90 and sm_100, or for gfx942, and there by the
number of instructions of a loop; no GPU has measured them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: Programs that fill a large GPU; a decoding step splits its keys until there are as many.
_PROGRAMS = 256


class Launch(NamedTuple):
    """`rows` that a program owns, `columns` of each step (at most 64), `warps` and pipeline `stages`."""

    rows: int
    columns: int
    warps: int
    stages: int = 2


#: By the padded head dim, for numbers of 16 bits. Gradients of keys at 256 are the exception to tensor cores' newest
#: instructions: steps that are wide enough for those do not fit the registers.
_NVIDIA = {
    "forward": {64: Launch(64, 64, 4), 128: Launch(64, 32, 4), 256: Launch(64, 32, 8)},
    "dq": {64: Launch(64, 64, 4), 128: Launch(64, 32, 4), 256: Launch(64, 32, 8)},
    "dkv": {64: Launch(64, 32, 4), 128: Launch(64, 32, 8), 256: Launch(32, 32, 8)},
}
#: Where a bias and shares by class would spill registers in those launches.
_WITH_CLASSES = {
    "forward+": {128: Launch(64, 32, 8), 256: Launch(64, 16, 8)},
    "dq+": {64: Launch(64, 32, 4)},
    "dkv+": {64: Launch(64, 16, 4)},
}
_AMD = {
    "forward": {64: Launch(64, 64, 4), 128: Launch(64, 32, 4), 256: Launch(64, 32, 4)},
    "dq": {64: Launch(64, 64, 4), 128: Launch(64, 32, 4), 256: Launch(64, 16, 4)},
    "dkv": {64: Launch(64, 32, 4), 128: Launch(64, 16, 4), 256: Launch(64, 16, 4)},
}
_FLOAT32 = {64: Launch(32, 32, 4), 128: Launch(32, 32, 8), 256: Launch(32, 16, 8)}
#: For the interpreter alone: few steps, and blocks in parts of either kind.
_FLOAT64 = {64: Launch(64, 64, 4), 128: Launch(64, 32, 4), 256: Launch(64, 64, 4)}
#: What compiles to bfloat16 without a spilled register for sm_80 and sm_90 both, as ROWSxCOLUMNSwWARPS.
_CLEAN = {
    "forward": {
        64: "64x64w4 64x64w8 64x32w4 64x32w8 32x64w4 32x32w4 32x32w8",
        128: "64x64w8 64x32w4 64x32w8 32x64w8 32x32w4 32x32w8",
        256: "64x32w8 32x32w4 32x32w8",
    },
    "dq": {
        64: "64x64w4 64x64w8 64x32w4 64x32w8 32x64w4 32x64w8 32x32w4 32x32w8",
        128: "64x64w4 64x64w8 64x32w4 64x32w8 32x64w4 32x64w8 32x32w4 32x32w8",
        256: "64x32w8 32x32w4 32x32w8",
    },
    "dkv": {
        64: "64x32w4 64x32w8 32x64w4 32x64w8 32x32w4 32x32w8",
        128: "64x32w8 32x64w8 32x32w8",
        256: "32x32w8",
    },
}
_ANY = "64x64w4 64x64w8 64x32w4 64x32w8 32x32w4 32x32w8"
_SMALL = {"delta": Launch(16, 64, 4), "decode": Launch(32, 32, 4)}

#: Statistics are taken in the steps of the forward pass.
_STEPS = {"statistics+": "forward"}

#: Queries times heads of a group that the decode kernel holds at most.
DECODE_ROWS = _SMALL["decode"].rows


def padded(size: int) -> int:
    """The next power of two, which is what a tile can have; products on tensor cores want 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def launch_of(kernel: str, head_dim: int, itemsize: int, *, amd: bool) -> Launch:
    """The launch of `kernel` for numbers of `itemsize` bytes.

    A plus behind its name, as in `forward+`, means with a bias and shares by class.
    """
    if kernel in _SMALL:
        return _SMALL[kernel]
    width = max(64, padded(head_dim))
    if itemsize > 2:
        return (_FLOAT32 if itemsize == 4 else _FLOAT64)[width]
    special = None if amd else _WITH_CLASSES.get(kernel, {}).get(width)
    return special or (_AMD if amd else _NVIDIA)[_STEPS.get(kernel, kernel.removesuffix("+"))][width]


def shortlist(kernel: str, head_dim: int, itemsize: int, *, amd: bool) -> tuple[Launch, ...]:
    """The launches worth a measurement on a GPU, the table's first."""
    table, width = launch_of(kernel, head_dim, itemsize, amd=amd), max(64, padded(head_dim))
    shapes = (_CLEAN[kernel][width] if itemsize == 2 and not amd else _ANY).split()
    sides = [tuple(map(int, re.split("[xw]", shape))) for shape in shapes]
    others = [Launch(rows, columns, warps, stages) for rows, columns, warps in sides for stages in (1, 2, 3)]
    return (table, *(launch for launch in others if launch != table))


def decode_splits(programs: int, keys: int, block_k: int) -> int:
    """Into how many parts, a power of two, the keys of each of `programs` are split."""
    blocks = -(-keys // block_k)
    splits = 1
    while splits * programs < _PROGRAMS and splits < blocks:
        splits *= 2
    return splits
