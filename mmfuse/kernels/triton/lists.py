"""The plan of a mask that is already there as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfuse.kernels.plan import BlockPlan, TileLists


def plan_of_mask(seen: Tensor, block_q: int = 64, block_k: int = 64) -> BlockPlan:
    """The plan of `seen`, bool `[B, Sq, Sk]`, in blocks whose sides are multiples of 64."""
    batch, queries, keys = seen.shape
    padded = F.pad(seen, (0, -keys % block_k, 0, -queries % block_q))
    tiles = padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).transpose(2, 3)
    count = tiles.sum((3, 4), dtype=torch.int32)
    full = count == block_q * block_k
    partial = (count > 0) & ~full
    flat, tile = torch.unique(tiles[partial].flatten(1), dim=0, return_inverse=True)
    bits = flat.view(-1, block_q, block_k)
    number = torch.zeros_like(count).masked_scatter_(partial, tile.int())
    return BlockPlan(
        batch=batch,
        queries=queries,
        keys=keys,
        block_q=block_q,
        block_k=block_k,
        by_query=_lists(full, partial, number),
        by_key=_lists(*(x.transpose(1, 2) for x in (full, partial, number))),
        words=_words(bits),
        words_t=_words(bits.transpose(1, 2)),
        visible=int(seen.sum()),
    )


def _lists(full: Tensor, partial: Tensor, number: Tensor) -> TileLists:
    """From `[B, owners, others]`: which tiles are full, which partial, and the bit tile of the latter."""
    full, partial, number = (x.flatten(0, 1) for x in (full, partial, number))
    # A partial tile costs about half more than a full one.
    work = 2 * full.sum(1) + 3 * partial.sum(1)
    return TileLists(
        full_offsets=_offsets(full),
        full_blocks=full.nonzero()[:, 1].int(),
        partial_offsets=_offsets(partial),
        partial_blocks=partial.nonzero()[:, 1].int(),
        partial_tiles=number[partial],
        order=work.argsort(descending=True, stable=True).int(),
    )


def _offsets(listed: Tensor) -> Tensor:
    return F.pad(listed.sum(1).cumsum(0), (1, 0)).int()


def _words(bits: Tensor) -> Tensor:
    """int64 `[U, rows, columns / 64]` of bool `[U, rows, columns]`."""
    return (bits.unflatten(2, (-1, 64)).long() << torch.arange(64, device=bits.device)).sum(3)
