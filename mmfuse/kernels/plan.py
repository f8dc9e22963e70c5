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
from torch.nn import functional as F

from mmfuse.kernels.tiles import EMPTY, FULL, UNKNOWN, classify, cut, evaluate, pack_bits
from mmfuse.kernels.visibility import Visibility


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


def plan_blocks(visibility: Visibility, block_q: int = 64, block_k: int = 64) -> BlockPlan:
    """The plan of a visibility, made once for each tile shape and kept with the visibility.

    Args:
        visibility: on any device; the plan lies on the same one.
        block_q: queries in a tile.
        block_k: keys in a tile.

    Raises:
        ValueError: a tile side that is neither at most 64 nor a multiple of 64.
    """
    for side in (block_q, block_k):
        if side < 1 or (side > 64 and side % 64):
            raise ValueError(f"sides of a tile are 1..64 or a multiple of 64, got {block_q}×{block_k}")
    return visibility.remember(("plan", block_q, block_k), lambda: _plan(visibility, block_q, block_k))


def _plan(visibility: Visibility, block_q: int, block_k: int) -> BlockPlan:
    queries, keys = cut(visibility, block_q, block_k)
    state = classify(visibility, queries, keys)
    unknown = (state == UNKNOWN).nonzero()
    step = max(1, (1 << 20) // (block_q * block_k))
    words, words_t, counts = [], [], []
    for tiles in unknown.split(step):
        sample, i, j = tiles.unbind(1)
        seen = evaluate(visibility, queries.take(sample, i), keys.take(sample, j))
        count = seen.sum((1, 2))
        full, partial = count == block_q * block_k, (count > 0) & (count < block_q * block_k)
        state[sample, i, j] = torch.where(partial, UNKNOWN, torch.where(full, FULL, EMPTY)).to(torch.uint8)
        counts.append(count[partial])
        words.append(pack_bits(seen[partial]))
        words_t.append(pack_bits(seen[partial].transpose(1, 2)))
    batch = len(state)
    shared, shared_t, tile = _share(words, words_t, block_q, block_k, state.device)
    full_tiles, partial_tiles = (state == FULL).flatten(0, 1), (state == UNKNOWN).flatten(0, 1)
    # The bit tiles are numbered in this grid, so that both orientations can look theirs up.
    number = torch.zeros(state.shape, dtype=torch.int32, device=state.device)
    number[state == UNKNOWN] = tile
    full_t, partial_t = ((state == kind).transpose(1, 2).flatten(0, 1) for kind in (FULL, UNKNOWN))
    visible = int(full_tiles.sum()) * block_q * block_k + sum(int(count.sum()) for count in counts)
    return BlockPlan(
        batch=batch,
        queries=len(visibility.queries),
        keys=len(visibility.keys),
        block_q=block_q,
        block_k=block_k,
        by_query=_lists(full_tiles, partial_tiles, number.flatten(0, 1)),
        by_key=_lists(full_t, partial_t, number.transpose(1, 2).flatten(0, 1)),
        words=shared,
        words_t=shared_t,
        visible=visible,
    )


def _share(
    words: list[Tensor], words_t: list[Tensor], block_q: int, block_k: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The different tiles among all partial ones in both orientations, and which of them each is, int32 `[P]`."""
    if not words or not sum(len(part) for part in words):
        shapes = (0, block_q, -(-block_k // 64)), (0, block_k, -(-block_q // 64))
        none, none_t = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes)
        return none, none_t, torch.zeros(0, dtype=torch.int32, device=device)
    all_words, all_words_t = torch.cat(words), torch.cat(words_t)
    different, tile = torch.unique(all_words.flatten(1), dim=0, return_inverse=True)
    example = tile.new_full((len(different),), len(tile))
    example.scatter_reduce_(0, tile, torch.arange(len(tile), device=device), "amin")
    return all_words[example], all_words_t[example], tile.int()


def _lists(full: Tensor, partial: Tensor, number: Tensor) -> TileLists:
    """The lists of bool grids `[owners, others]`, with the `number` of each bit tile in a third one."""

    def offsets(grid: Tensor) -> Tensor:
        return F.pad(grid.sum(1).cumsum(0), (1, 0)).int()

    # A partial tile costs about half as much again as a full one.
    work = 2 * full.sum(1) + 3 * partial.sum(1)
    return TileLists(
        full_offsets=offsets(full),
        full_blocks=full.nonzero()[:, 1].int().contiguous(),
        partial_offsets=offsets(partial),
        partial_blocks=partial.nonzero()[:, 1].int().contiguous(),
        partial_tiles=number[partial].contiguous(),
        order=work.argsort(descending=True, stable=True).int(),
    )
