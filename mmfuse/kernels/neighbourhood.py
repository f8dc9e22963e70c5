"""2-D windows over the grid of an image: neighbourhood attention (arXiv 2204.07143), with stride and dilation.

A token at row `y` of a grid of `height` rows sees `size` rows: those around it, or at a border the nearest.
With a dilation `d` it sees every d-th row, those whose remainder by `d` is its own (arXiv 2209.15001). With a stride
`s`, runs of `s` rows (of one remainder) see the same ones: those around the middle row of the run (arXiv 2504.16922).
Columns likewise. Rows are renumbered, all of one remainder in front of those of the next, so that what a token sees is
one stretch of rows and one of columns: four comparisons of integers, whatever the dilation.

Deliberate difference: a grid with fewer than `size` rows of a remainder is seen whole; the papers demand more rows.

A token without a place sees nothing under `Condition.WINDOW_2D` and is not seen. Frames of a video are one grid: to
keep them apart make each a segment and join WINDOW_2D with SAME_SEGMENT, as for several images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: No grid has as many rows: it keeps rows of different remainders apart.
_ROWS = 1 << 14


@dataclass(frozen=True)
class Window2D:
    """What a token of a grid sees under `Condition.WINDOW_2D`.

    Attributes:
        size: rows and columns that are seen.
        stride: rows and columns that share what they see; (1, 1) is a sliding window, `size` is a blocked one.
        dilation: the distance between two that are seen.

    Raises:
        ValueError: a number below 1, or a stride greater than the size.
    """

    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if min(*self.size, *self.stride, *self.dilation) < 1:
            raise ValueError(f"size, stride and dilation of a window are at least 1, got {self}")
        if self.stride[0] > self.size[0] or self.stride[1] > self.size[1]:
            raise ValueError(f"the stride of a window is at most its size, got {self}")

    def places(self, grid: Tensor, segment: Tensor, placed: Tensor) -> dict[str, Tensor]:
        """The fields of an `Axis` that WINDOW_2D compares, `[B, S]` each.

        Args:
            grid: `[B, S, 3]` places (t, y, x), from 0 on.
            segment: `[B, S]`; each is a grid of its own, as large as its largest place.
            placed: bool `[B, S]`, the tokens that have a place.
        """
        fields = {}
        for axis, names in enumerate((("y", "top", "bottom"), ("x", "left", "right"))):
            place = grid[..., axis + 1].long().masked_fill(~placed, 0)
            values = self._stretch(place, _extent(place, segment, placed), axis)
            for name, value, absent in zip(names, values, (-1, 0, -2), strict=True):
                fields[name] = value.masked_fill(~placed, absent)
        return fields

    def _stretch(self, place: Tensor, extent: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Number, and first and last number that is seen."""
        size, stride, dilation = self.size[axis], self.stride[axis], self.dilation[axis]
        remainder, order = place % dilation, place // dilation
        count = (extent - remainder + dilation - 1) // dilation
        leader = torch.minimum(order // stride * stride + stride // 2, count - 1)
        first = torch.minimum((leader - size // 2).clamp(min=0), (count - size).clamp(min=0))
        last = torch.minimum(first + size, count) - 1
        base = remainder * _ROWS
        return base + order, base + first, base + last


def _extent(place: Tensor, segment: Tensor, placed: Tensor) -> Tensor:
    """`[B, S]`: one more than the largest place in each token's segment."""
    number = segment.clamp(min=0)
    most = int(number.max()) + 1 if number.numel() else 1
    largest = torch.zeros(len(place), most, dtype=place.dtype, device=place.device)
    largest.scatter_reduce_(1, number, place.masked_fill(~placed, 0), "amax")
    return largest.gather(1, number) + 1
