"""What the kernels read of a mask: for each block the blocks that it sees, whole or in part, and bits for the latter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Lists(NamedTuple):
    """One orientation of a mask. A place is a block of rows in a sample: `sample * blocks + block`.

    Attributes:
        order: int32 `[places]`, the places in the order in which they are worked on.
        full_start: int32 `[places + 1]`, where the list of each place begins in `full`.
        full: int32, blocks of columns that are seen whole.
        partial_start: int32 `[places + 1]`, the same for `partial`.
        partial: int32, blocks of columns that are seen in part.
        tile: int32, the bit tile of each entry of `partial`.
        words: int64 `[tiles, rows, columns / 64]`; bit c of a word is column c.
    """

    order: Tensor
    full_start: Tensor
    full: Tensor
    partial_start: Tensor
    partial: Tensor
    tile: Tensor
    words: Tensor


def lists_of(seen: Tensor, blocks: tuple[int, int]) -> tuple[Lists, Lists]:
    """The lists of the blocks of queries and those of the blocks of keys.

    Args:
        seen: bool `[B, Sq, Sk]`.
        blocks: queries and keys of a block, multiples of 64.
    """
    (_, queries, keys), (block_q, block_k) = seen.shape, blocks
    padded = F.pad(seen, (0, -keys % block_k, 0, -queries % block_q))
    tiles = padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).transpose(2, 3)
    return _one_way(tiles), _one_way(tiles.transpose(1, 2).transpose(3, 4))


def _one_way(tiles: Tensor) -> Lists:
    """From bool `[B, row blocks, column blocks, rows, columns]`."""
    count = tiles.sum((3, 4), dtype=torch.int32).flatten(0, 1)
    full = count == tiles.shape[3] * tiles.shape[4]
    partial = (count > 0) & ~full
    # A tile in part costs about half more than a whole one; the longest lists come first.
    cost = 2 * full.sum(1) + 3 * partial.sum(1)
    bits = tiles.flatten(0, 1)[partial].unflatten(2, (-1, 64))
    words = (bits.long() << torch.arange(64, device=tiles.device)).sum(3)
    words, tile = torch.unique(words, dim=0, return_inverse=True) if len(words) else (words, words.new_empty(0))
    return Lists(
        order=cost.argsort(descending=True, stable=True).int(),
        full_start=_starts(full),
        full=full.nonzero()[:, 1].int(),
        partial_start=_starts(partial),
        partial=partial.nonzero()[:, 1].int(),
        tile=tile.int(),
        words=words,
    )


def _starts(listed: Tensor) -> Tensor:
    """Where each row's part begins, of bool `[rows, columns]`."""
    return F.pad(listed.sum(1).cumsum(0), (1, 0)).int()
