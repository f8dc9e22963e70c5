"""`BlockPlan`: which tiles of the mask a tiled kernel computes, as lists, made once a batch and never as N×N.

The mask is cut into tiles of `block_q` queries × `block_k` keys. A tile is *empty* (no pair is visible: it is in no
list), *full* (every pair is visible: a kernel computes it without a mask and without bounds checks) or *partial*: its
visible pairs are bits, and equal partial tiles share theirs.

Shapes: `B` samples, `nq = ceil(Sq / block_q)` and `nk = ceil(Sk / block_k)` blocks of a sample, `F` full and `P`
partial tiles over the batch, `U` different partial tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileLists:
    """The tiles of each block of one axis (the owners), as compressed rows; the batch is folded into the owners.

    Owner `o` is block `o % n` of sample `o // n`, with `n` blocks to a sample on its axis. Its full tiles are
    `full_blocks[full_offsets[o] : full_offsets[o + 1]]`, its partial ones likewise. All tensors are int32, contiguous
    and on the device of the visibility; a list may have length 0.

    Attributes:
        full_offsets: `[owners + 1]`.
        full_blocks: `[F]`, blocks of the other axis, counted inside the sample, ascending for each owner.
        partial_offsets: `[owners + 1]`.
        partial_blocks: `[P]`, as `full_blocks`.
        partial_tiles: `[P]`, which of the `U` bit tiles each is: the first index of `words` and `words_t`.
        order: `[owners]`, all owners, the one with most work first, so that long programs do not start last.
    """

    full_offsets: Tensor
    full_blocks: Tensor
    partial_offsets: Tensor
    partial_blocks: Tensor
    partial_tiles: Tensor
    order: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """The tiles of a mask, listed by query block (forward, dq) and by key block (dk, dv).

    A tile that reaches over the end of either axis is never full, nor is one with a padding token: kernels need bounds
    checks and care for rows without keys in partial tiles alone. Bits outside of the axes are 0.

    Attributes:
        batch: `B`.
        queries: `Sq`.
        keys: `Sk`.
        block_q: queries in a tile; at most 64, or a multiple of 64.
        block_k: keys in a tile; at most 64, or a multiple of 64.
        by_query: owners are the `B · nq` query blocks; their lists hold key blocks.
        by_key: owners are the `B · nk` key blocks; their lists hold query blocks.
        words: int64 `[U, block_q, ceil(block_k / 64)]`: bit `j` of `words[u, i, w]` says whether query `i` of the tile
            sees its key `64 w + j`. Bit 63 is the sign.
        words_t: int64 `[U, block_k, ceil(block_q / 64)]`, the same tiles transposed: bit `j` of `words_t[u, i, w]` says
            whether key `i` is seen by query `64 w + j`.
        visible: pairs of query and key that see each other, over the batch.
    """

    batch: int
    queries: int
    keys: int
    block_q: int
    block_k: int
    by_query: TileLists
    by_key: TileLists
    words: Tensor
    words_t: Tensor
    visible: int

    @property
    def query_blocks(self) -> int:
        """`nq`, the query blocks of one sample."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """`nk`, the key blocks of one sample."""
        return -(-self.keys // self.block_k)

    @property
    def full(self) -> int:
        """`F`."""
        return len(self.by_query.full_blocks)

    @property
    def partial(self) -> int:
        """`P`."""
        return len(self.by_query.partial_blocks)

    @property
    def density(self) -> float:
        """The share of all pairs that is visible."""
        return self.visible / max(1, self.batch * self.queries * self.keys)

    @property
    def tile_efficiency(self) -> float:
        """The share of the pairs in computed tiles that is visible; 1 if nothing is computed."""
        computed = (self.full + self.partial) * self.block_q * self.block_k
        return self.visible / computed if computed else 1.0

    def useful_flops(self, heads: int, width: int, *, backward: bool = False) -> int:
        """FLOPs of attention over the visible pairs alone: `4 · heads · width` each, and 2.5 times that backward."""
        forward = 4 * heads * width * self.visible
        return forward * 7 // 2 if backward else forward

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the plan."""
        lists = [tensor for lists in (self.by_query, self.by_key) for tensor in vars(lists).values()]
        return sum(int(tensor.nbytes) for tensor in (*lists, self.words, self.words_t))

    def dense(self, *, by_key: bool = False) -> Tensor:
        """The mask, bool `[B, Sq, Sk]`, rebuilt from the lists of one orientation; for tests."""
        lists, words = (self.by_key, self.words_t) if by_key else (self.by_query, self.words)
        owners, others = (self.key_blocks, self.query_blocks) if by_key else (self.query_blocks, self.key_blocks)
        own, other = (self.block_k, self.block_q) if by_key else (self.block_q, self.block_k)
        tiles = torch.zeros(self.batch * owners, others, own, other, dtype=torch.bool, device=words.device)
        tiles[owner_of(lists.full_offsets), lists.full_blocks.long()] = True
        bits = (words[..., None] >> torch.arange(64, device=words.device)) & 1
        bits = bits.flatten(2)[..., :other].bool()
        tiles[owner_of(lists.partial_offsets), lists.partial_blocks.long()] = bits[lists.partial_tiles.long()]
        tiles = tiles.unflatten(0, (self.batch, owners)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return (tiles.transpose(1, 2) if by_key else tiles)[:, : self.queries, : self.keys]


def owner_of(offsets: Tensor) -> Tensor:
    """int64 `[tiles]`: the owner of each entry of a list with these `offsets [owners + 1]`."""
    counts = offsets.diff().long()
    return torch.arange(len(counts), device=offsets.device).repeat_interleave(counts)
