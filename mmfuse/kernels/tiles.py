"""Tiles of a mask: which are empty or full by three-valued logic on block summaries, and the bits of the others.

For every block of tokens and every class in it, the smallest and the largest value of each field are known. From these
intervals a condition between a query block and a key block is *always*, *never* or *unknown*; conjunctions, rules and
tiles follow by Kleene's logic. Only unknown tiles are evaluated pair by pair.

Shapes: `B` samples, `nq` and `nk` blocks, `C` classes, `U` tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfuse.kernels.visibility import AT_LEAST, AT_MOST, EQUAL, Axis, Comparison, Visibility, comparisons

EMPTY, FULL, UNKNOWN = range(3)

#: Larger than any field, and small enough that differences fit into 32 bits.
_BIG = 1 << 30

#: Pairs that are looked at in one go: it bounds the memory of planning.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Blocks:
    """The tokens of one axis, cut into blocks of equal size; the last one is filled up with padding.

    Attributes:
        fields: int32 `[B, n, size]` of each field that the rules compare, and of `document` and `cls`.
        low: int32 `[C, B, n]`, the smallest value of each compared field among the live tokens of a class.
        high: the largest, likewise.
        present: bool `[C, B, n]`, whether the block has live tokens of the class.
        whole: bool `[B, n]`, whether all tokens of the block are live.
    """

    fields: Mapping[str, Tensor]
    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    present: Tensor
    whole: Tensor

    @staticmethod
    def of(axis: Axis, size: int, compared: set[str], classes: int) -> Blocks:
        count = -(-len(axis) // size)

        def cut(name: str) -> Tensor:
            values = F.pad(getattr(axis, name).int(), (0, count * size - len(axis)), value=-1)
            return values.unflatten(1, (count, size))

        fields = {name: cut(name) for name in sorted(compared | {"document", "cls"})}
        live = fields["document"] >= 0
        members = [live & (fields["cls"] == c) for c in range(classes)]

        def smallest(values: Tensor) -> Tensor:
            return torch.stack([values.masked_fill(~inside, _BIG).amin(-1) for inside in members])

        compared = compared | {"document"}
        return Blocks(
            fields,
            low={name: smallest(fields[name]) for name in compared},
            high={name: -smallest(-fields[name]) for name in compared},
            present=torch.stack([inside.any(-1) for inside in members]),
            whole=live.all(-1),
        )

    def take(self, sample: Tensor, block: Tensor) -> dict[str, Tensor]:
        """The fields of some blocks: int32 `[U, size]` each."""
        return {name: values[sample, block] for name, values in self.fields.items()}


def compared_fields(visibility: Visibility) -> tuple[set[str], set[str]]:
    """The fields of queries and those of keys that the rules and the window compare, `document` and `cls` aside."""
    used = [each for conjunction in visibility.pairs_by_conjunction() for each in comparisons(conjunction)]
    window = {"slot"} if visibility.window is not None else set()
    return {each.mine for each in used} | window, {each.theirs for each in used} | window


def cut(visibility: Visibility, block_q: int, block_k: int) -> tuple[Blocks, Blocks]:
    """Queries and keys in blocks."""
    mine, theirs = compared_fields(visibility)
    classes = len(visibility.names)
    queries = Blocks.of(visibility.queries, block_q, mine, classes)
    return queries, Blocks.of(visibility.keys, block_k, theirs, classes)


class _Intervals:
    """Query blocks of one class against key blocks of one class: for each comparison (always, never), `[B, nq, nk]`."""

    def __init__(self, queries: Blocks, keys: Blocks, rows: slice, pair: tuple[int, int]) -> None:
        self._queries, self._keys, self._rows, self._pair = queries, keys, rows, pair
        self._known: dict[Comparison, tuple[Tensor, Tensor]] = {}

    def here(self) -> Tensor:
        """Which block pairs have tokens of both classes."""
        q, k = self._pair
        return self._queries.present[q][:, self._rows, None] & self._keys.present[k][:, None, :]

    def _bounds(self, mine: str, theirs: str) -> tuple[Tensor, Tensor]:
        """The smallest and the largest difference between the field of a query and that of a key."""
        q, k = self._pair
        low, high = self._queries.low[mine][q][:, self._rows, None], self._queries.high[mine][q][:, self._rows, None]
        return low - self._keys.high[theirs][k][:, None], high - self._keys.low[theirs][k][:, None]

    def holds(self, each: Comparison) -> tuple[Tensor, Tensor]:
        if each not in self._known:
            low, high = self._bounds(each.mine, each.theirs)
            if each.relation == AT_LEAST:
                self._known[each] = low >= 0, high < 0
            elif each.relation == AT_MOST:
                self._known[each] = high <= 0, low > 0
            else:
                # Equal for sure only where all values are one: then no difference is possible at all.
                self._known[each] = (low == 0) & (high == 0), (low > 0) | (high < 0)
        return self._known[each]

    def within(self, window: int) -> tuple[Tensor, Tensor]:
        low, high = self._bounds("slot", "slot")
        return (low > -window) & (high < window), (low >= window) | (high <= -window)


def classify(visibility: Visibility, queries: Blocks, keys: Blocks) -> Tensor:
    """uint8 `[B, nq, nk]` of EMPTY, FULL and UNKNOWN; what it calls empty or full is so."""
    nq, nk = queries.whole.shape[1], keys.whole.shape[1]
    step = max(1, _CHUNK // max(1, len(queries.whole) * nk))
    parts = [_classify_rows(visibility, queries, keys, slice(i, min(i + step, nq))) for i in range(0, nq, step)]
    return (
        torch.cat(parts, dim=1) if parts else queries.whole.new_zeros((len(queries.whole), nq, nk), dtype=torch.uint8)
    )


def _classify_rows(visibility: Visibility, queries: Blocks, keys: Blocks, rows: slice) -> Tensor:
    # A padding token sees nothing and is not seen: its block is never wholly visible.
    always = queries.whole[:, rows, None] & keys.whole[:, None, :]
    never = torch.ones_like(always)
    classes = range(len(visibility.names))
    for pair in ((q, k) for q in classes for k in classes):
        between = _Intervals(queries, keys, rows, pair)
        here = between.here()
        if not bool(here.any()):
            continue
        yes, no = torch.zeros_like(here), torch.ones_like(here)
        for conjunction in set(visibility.rules.get(pair, ())):
            held, failed = torch.ones_like(here), torch.zeros_like(here)
            for each in comparisons(conjunction):
                true, false = between.holds(each)
                held, failed = held & true, failed | false
            yes, no = yes | held, no & failed
        true, false = between.holds(Comparison("document", EQUAL, "document"))
        yes, no = yes & true, no | false
        if visibility.window is not None:
            true, false = between.within(visibility.window)
            yes, no = yes & true, no | false
        always &= yes | ~here
        never &= no | ~here
    return torch.where(never, EMPTY, torch.where(always, FULL, UNKNOWN)).to(torch.uint8)


def evaluate(visibility: Visibility, query: Mapping[str, Tensor], key: Mapping[str, Tensor]) -> Tensor:
    """bool `[U, block_q, block_k]`: which pairs are visible in the tiles of these query and key blocks."""
    same = query["document"].unsqueeze(2) == key["document"].unsqueeze(1)
    seen = torch.zeros_like(same)
    classes = torch.arange(len(visibility.names), device=same.device)
    # Sets of classes are bytes: one bit for each class of key.
    key_class = (1 << classes).to(torch.uint8)[key["cls"].clamp(min=0)].unsqueeze(1)
    for conjunction, pairs in visibility.pairs_by_conjunction().items():
        sets = [sum({1 << k for q, k in pairs if q == c}) for c in range(len(visibility.names))]
        shown = torch.tensor(sets, dtype=torch.uint8, device=same.device)[query["cls"].clamp(min=0)].unsqueeze(2)
        held = (shown & key_class) != 0
        for each in comparisons(conjunction):
            held &= each(query[each.mine].unsqueeze(2), key[each.theirs].unsqueeze(1))
        seen |= held
    seen &= same
    seen &= (query["document"] >= 0).unsqueeze(2)
    if visibility.window is not None:
        seen &= (query["slot"].unsqueeze(2) - key["slot"].unsqueeze(1)).abs() < visibility.window
    return seen


def pack_bits(seen: Tensor) -> Tensor:
    """int64 words `[U, R, ceil(C / 64)]` of bool `[U, R, C]`: bit `j` of word `w` is column `64 w + j`."""
    padded = F.pad(seen, (0, -seen.shape[2] % 64))
    # Eight bools are eight bytes of one word; this factor gathers their lowest bits in the highest byte.
    eights = padded.flatten().view(torch.int64) * 0x0102040810204080
    return (eights >> 56).to(torch.uint8).view(torch.int64).view(*padded.shape[:2], padded.shape[2] // 64)
