"""The order of tokens in which a 2-D window fills few tiles: the places of a grid in squares of 8 × 8.

Row by row, the 64 tokens of a block lie in one or two rows of a wide grid, and their windows reach over many rows. In
squares (as NATTEN orders them, arXiv 2504.16922) their windows overlap, so fewer tiles hold anything. Small grids gain
nothing: the order is used only where it pays, which is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfuse.kernels.plan import plan_blocks
from mmfuse.kernels.visibility import Condition, Visibility

#: Rows and columns of a square; a square is a block of a plan.
SIDE = 8
#: The order must leave less than this share of the tiles: moving queries, keys and values costs something, too.
WORTH_IT = 0.75


@dataclass(frozen=True)
class TileOrder:
    """Tokens in another order, and the way back.

    Attributes:
        visibility: of the tokens in their new order.
        order: `[B, S]`, the token that stands at each place.
        place: `[B, S]`, where each token stands.
    """

    visibility: Visibility
    order: Tensor
    place: Tensor

    def sort(self, x: Tensor) -> Tensor:
        """`x [B, H, S, D]` in the new order."""
        return _taken(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """`x [B, H, S, D]` in the old order."""
        return _taken(x, self.place)

    def sort_rows(self, x: Tensor) -> Tensor:
        """`x [B, S]` in the new order."""
        return x.gather(1, self.order)


def tile_order(visibility: Visibility) -> TileOrder | None:
    """The order in which this mask fills fewer tiles, or None where the order that it has will do."""
    return visibility.remember("tile order", lambda: _tile_order(visibility))


def squares(visibility: Visibility) -> Tensor:
    """`[B, S]`: the keys, the places of each grid in squares; runs of tokens that have no place stay as they are."""
    keys = visibility.keys
    if keys.y is None or keys.x is None:
        raise ValueError("the tokens have no places in a grid")
    placed = keys.y >= 0
    fields = torch.stack([placed.long(), keys.segment.long(), keys.document.long()])
    new = (fields[..., 1:] != fields[..., :-1]).any(0)
    run = torch.nn.functional.pad(new.cumsum(1), (1, 0))
    y, x = (place.masked_fill(~placed, 0).long() for place in (keys.y, keys.x))
    order = torch.arange(len(keys), device=y.device).expand_as(y)
    # Sorted by the last of these first: every sort keeps the order of equals.
    for key in (x, y, x // SIDE, y // SIDE, run):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


def _tile_order(visibility: Visibility) -> TileOrder | None:
    windows = any(Condition.WINDOW_2D in term for terms in visibility.rules.values() for term in terms)
    same = visibility.shape[1] == visibility.shape[2] and torch.equal(visibility.queries.slot, visibility.keys.slot)
    if not windows or not same:
        return None
    order = squares(visibility)
    sorted_ = visibility.select(order, order)
    before, after = (plan.full + plan.partial for plan in (plan_blocks(visibility), plan_blocks(sorted_)))
    return TileOrder(sorted_, order, order.argsort(dim=1)) if after < WORTH_IT * before else None


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
