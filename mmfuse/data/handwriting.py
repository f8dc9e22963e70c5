"""Real handwriting as demo data: scans, their split, and scenes made of them.

The scans are those of `sklearn.datasets.load_digits`: 1,797 images of 8x8 pixels, values 0..16, which is scikit-learn's
copy of the test part of the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0). That copy carries no writer ids. The split is therefore by scan and
**not** by writer: no scan occurs in two splits, but a writer may.

A scene is a grid of scans. One scan is one 8x8 patch, so that an encoder with patch size 8 gives one visual token for
each digit.

Shapes: N scans or scenes, R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SOURCE: Final = (
    "sklearn.datasets.load_digits: E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49"
)
LICENCE: Final = "CC BY 4.0"
SCAN_SIZE: Final = 8
SPLITS: Final = ("train", "val", "test")

_SHARES: Final = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Scans:
    """The scans of one split.

    Attributes:
        pixels: uint8 `[N, 8, 8]`, 0 is paper and 255 is ink.
        labels: int64 `[N]`, the digit.
        index: int64 `[N]`, the row in scikit-learn's table: the identity of a scan.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Scenes:
    """Scenes of equal size.

    Attributes:
        pixels: uint8 `[N, 8 R, 8 C]`.
        digits: int64 `[N, R, C]`, what is written in each cell.
        scans: int64 `[N, R, C]`, `Scans.index` of the scan in each cell.
    """

    pixels: NDArray[np.uint8]
    digits: NDArray[np.int64]
    scans: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.digits)


def load_scans() -> dict[str, Scans]:
    """Return the scans of every split: 70 % train, 10 % val, 20 % test of each digit, the same on every call."""
    from sklearn.datasets import load_digits

    table = load_digits()
    pixels = ((table.images * 255 + 8) // 16).astype(np.uint8)
    labels = table.target.astype(np.int64)
    rng = np.random.default_rng(1998)
    parts: dict[str, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
    for digit in range(10):
        index = rng.permutation(np.flatnonzero(labels == digit))
        cuts = np.round(np.cumsum(_SHARES)[:-1] * len(index)).astype(int)
        for split, part in zip(SPLITS, np.split(index, cuts), strict=True):
            parts[split].append(part)
    chosen = {split: np.sort(np.concatenate(part)) for split, part in parts.items()}
    return {split: Scans(pixels[index], labels[index], index) for split, index in chosen.items()}


def make_scenes(
    scans: Scans,
    count: int,
    rng: np.random.Generator,
    *,
    rows: int = 2,
    cols: int = 2,
    shift: float = 0.0,
    gain: float = 0.0,
) -> Scenes:
    """Compose `count` scenes at random.

    Each scene draws its digits from a palette of 3..10 digits of its own, so that repeated digits are common enough
    for questions that count them.

    Args:
        scans: where the cells come from.
        count: number of scenes.
        rng: the only source of randomness.
        rows: cells from top to bottom.
        cols: cells from left to right.
        shift: probability with which a scan is moved by one pixel in one of the four directions.
        gain: ink is multiplied by a factor drawn from `[1 - gain, 1]`, one for each cell.

    Raises:
        ValueError: `rows` or `cols` is outside 1..9 (questions name them with words), or `shift`, `gain` outside 0..1.
    """
    if not (1 <= rows <= 9 and 1 <= cols <= 9):
        raise ValueError(f"a scene has 1..9 rows and columns, got {rows} x {cols}")
    if not (0 <= shift <= 1 and 0 <= gain <= 1):
        raise ValueError(f"shift and gain lie in 0..1, got shift={shift}, gain={gain}")
    palette = rng.permuted(np.tile(np.arange(10), (count, 1)), axis=1)
    size = rng.integers(3, 11, size=(count, 1, 1))
    pick = (rng.random((count, rows, cols)) * size).astype(np.int64)
    digits = np.take_along_axis(palette, pick.reshape(count, -1), axis=1).reshape(pick.shape)

    by_digit = np.argsort(scans.labels, kind="stable")
    held = np.bincount(scans.labels, minlength=10)
    first = np.cumsum(held) - held
    nth = (rng.random(digits.shape) * held[digits]).astype(np.int64)
    chosen = by_digit[first[digits] + nth]

    cells = scans.pixels[chosen].reshape(-1, SCAN_SIZE, SCAN_SIZE)
    if shift:
        cells = _shifted(cells, shift, rng)
    if gain:
        factor = 1 - gain * rng.random((len(cells), 1, 1))
        cells = np.round(cells * factor).astype(np.uint8)
    grid = cells.reshape(count, rows, cols, SCAN_SIZE, SCAN_SIZE).transpose(0, 1, 3, 2, 4)
    pixels = np.ascontiguousarray(grid).reshape(count, rows * SCAN_SIZE, cols * SCAN_SIZE)
    return Scenes(pixels, digits, scans.index[chosen])


def _shifted(cells: NDArray[np.uint8], share: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Move a `share` of the cells `[N, 8, 8]` by one pixel; what enters is paper, never the neighbour's ink."""
    way = np.where(rng.random(len(cells)) < share, rng.integers(0, 4, len(cells)), -1)
    moved = cells.copy()
    for direction, (axis, step) in enumerate(((1, -1), (1, 1), (2, -1), (2, 1))):
        group = way == direction
        rolled = np.roll(cells[group], step, axis=axis)
        edge = 0 if step > 0 else SCAN_SIZE - 1
        rolled[(slice(None),) + (slice(None),) * (axis - 1) + (edge,)] = 0
        moved[group] = rolled
    return moved
