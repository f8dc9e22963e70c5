"""The order in which a source is gone through: blocks of a few shards, shuffled inside.

Position `p` of the endless sequence of a source is one sample of epoch `p // size`. In every epoch the shards stand in
another order, neighbours are gathered into blocks of about `block` samples, and the samples of a block in another
order. Memory is that of a block, however large the source; reads stay within a few shards at a time; and a source that
is no larger than a block is shuffled as a whole.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Samples that are shuffled together: half a megabyte of numbers.
BLOCK: Final = 1 << 16
#: Draws that are near each other may lie on both sides of the border between two blocks, or between two epochs.
_KEPT: Final = 4


class BlockShuffle:
    """Sample numbers of one source by position.

    Args:
        parts: number of samples in each shard.
        name: of the source; two sources of one size have different orders.
        seed: of the order.
        block: samples that are shuffled together, at least; the last block of an epoch may have fewer.
    """

    def __init__(self, parts: Sequence[int], name: str, seed: int, block: int = BLOCK) -> None:
        self.size = sum(parts)
        self._sizes = np.array(parts, dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._seed = (seed, number_of(name))
        self._block = block
        self._blocks: OrderedDict[int, tuple[list[NDArray[np.int64]], NDArray[np.int64]]] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the epoch that `position` belongs to, and the number of the sample."""
        epoch, place = divmod(position, self.size)
        blocks, begins = self._epoch(epoch)
        number = int(np.searchsorted(begins, place, side="right")) - 1
        return epoch, int(self._order(epoch, number, blocks[number])[place - int(begins[number])])

    def _epoch(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The shards of each block, and how many samples of the epoch stand before it."""
        if epoch not in self._blocks:
            if self.size <= self._block:
                found = [np.arange(len(self._sizes))], np.zeros(1, dtype=np.int64)
            else:
                shards = permutation([*self._seed, epoch, 0, 1], len(self._sizes))
                before = np.cumsum(self._sizes[shards]) - self._sizes[shards]
                cuts = np.flatnonzero(np.diff(before // self._block)) + 1
                # Sorted, so that a block is one run of numbers where its shards are neighbours.
                found = [np.sort(part) for part in np.split(shards, cuts)], before[np.append(0, cuts)]
            _keep(self._blocks, epoch, found)
        return self._blocks[epoch]

    def _order(self, epoch: int, number: int, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        if (epoch, number) not in self._orders:
            samples = np.concatenate([np.arange(self._sizes[one]) + self._firsts[one] for one in shards])
            seed = [*self._seed, epoch, number] if number else [*self._seed, epoch]
            _keep(self._orders, (epoch, number), samples[permutation(seed, len(samples))])
        return self._orders[epoch, number]


def permutation(seed: Sequence[int], size: int) -> NDArray[np.int64]:
    """A permutation `[size]`. NumPy promises raw bits to stay as they are, its own `permutation` may change."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size), kind="stable")


def number_of(*names: object) -> int:
    """64 bits that stand for these names, the same in every process and on every machine."""
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _keep(kept: OrderedDict[Any, Any], key: object, value: object) -> None:
    kept[key] = value
    if len(kept) > _KEPT:
        kept.popitem(last=False)
