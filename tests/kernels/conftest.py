"""Plans of blocks made by brute force from a dense mask: the kernels are tested apart from the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


def _lists(tiles: Tensor) -> dict[str, Tensor]:
    """One orientation from bool `[B, rows, columns, R, C]`; the order of work is the reverse one, as good as any."""
    whole = tiles.flatten(-2).all(-1).flatten(0, 1)
    part = tiles.flatten(-2).any(-1).flatten(0, 1) & ~whole
    start = [torch.cat([torch.zeros(1, dtype=torch.long), x.sum(1).cumsum(0)]).int() for x in (whole, part)]
    bits = tiles.flatten(0, 1)[part].unflatten(-1, (-1, 64)).long() << torch.arange(64)
    return {
        "order": torch.arange(len(whole), dtype=torch.int32).flip(0),
        "full_start": start[0],
        "full": whole.nonzero()[:, 1].int(),
        "partial_start": start[1],
        "partial": part.nonzero()[:, 1].int(),
        "tile": torch.arange(int(part.sum()), dtype=torch.int32),
        "words": bits.sum(-1),
    }


@pytest.fixture
def by_force() -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Maker of the lists of the queries and those of the keys from `seen [B, Sq, Sk]` and a block's shape."""

    def make(seen: Tensor, block_q: int = 64, block_k: int = 64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        batch, queries, keys = seen.shape
        rows, columns = -(-queries // block_q), -(-keys // block_k)
        padded = torch.zeros(batch, rows * block_q, columns * block_k, dtype=torch.bool)
        padded[:, :queries, :keys] = seen
        tiles = padded.view(batch, rows, block_q, columns, block_k).transpose(2, 3)
        return _lists(tiles), _lists(tiles.transpose(1, 2).transpose(3, 4))

    return make


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
