"""A mask as disjoint rectangles, each wholly visible or causal, found from the runs of its tokens.

A run is a stretch of tokens that the rules cannot tell apart, but for ranks that all are equal or count up by one.
Pairs of runs are few, and three-valued logic says of each whether it is empty, full or exactly causal; neighbours are
joined.

    NAAViT (T text, I image): two causal squares 1 and 3, and one full rectangle 2
          T T I I T T
        T 1
        T 1 1
        I
        I
        T 2 2 2 2 3
        T 2 2 2 2 3 3
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmfuse.kernels.tiles import EMPTY, FULL, UNKNOWN, Blocks, classify, compared_fields
from mmfuse.kernels.visibility import Axis, Condition, Visibility

CAUSAL = 3

#: Covers of more rectangles than this are not made: calls would cost more than they save.
MAX_RECTANGLES = 1024
_MAX_RUNS = 1024


class Rectangle(NamedTuple):
    """Queries `query..query_stop` of samples `sample..sample_stop` see the keys `key..key_stop`.

    If `causal`, the rectangle is a square, and its query `i` sees its keys up to and including `i`.
    """

    sample: int
    sample_stop: int
    query: int
    query_stop: int
    key: int
    key_stop: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key."""
        rows, columns = self.query_stop - self.query, self.key_stop - self.key
        return (self.sample_stop - self.sample) * (rows * (rows + 1) // 2 if self.causal else rows * columns)


@dataclass(frozen=True)
class Cover:
    """The rectangles of a mask, top to bottom; or none and the `problem`, if rectangles cannot express it."""

    rectangles: tuple[Rectangle, ...] = ()
    problem: str | None = None

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key."""
        return sum(rectangle.pairs for rectangle in self.rectangles)


def rectangle_cover(visibility: Visibility) -> Cover:
    """The mask as rectangles, made once and kept with the visibility."""
    return visibility.remember("cover", lambda: _cover(visibility))


def _cover(visibility: Visibility) -> Cover:
    starts_q, starts_k = _aligned_runs(visibility)
    longest = max(int(starts_q.sum(1).max()), int(starts_k.sum(1).max())) if starts_q.numel() else 0
    if longest > _MAX_RUNS:
        return Cover(
            problem=f"a sample has {longest} runs of tokens, and more than {_MAX_RUNS} make too many rectangles"
        )
    (queries, edges_q), (keys, edges_k) = _runs(visibility, True, starts_q), _runs(visibility, False, starts_k)
    state = _classify_runs(visibility, queries, keys)
    if bool((state == UNKNOWN).any()):
        return Cover(problem="some of its parts are neither full, nor empty, nor causal (a window or SELF cuts them)")
    found: dict[tuple[int, int, int, int, bool], list[int]] = defaultdict(list)
    for sample, grid in enumerate(state.tolist()):
        for rectangle in _join(grid, edges_q[sample], edges_k[sample]):
            found[rectangle].append(sample)
    rectangles = [Rectangle(start, stop, *where) for where, samples in found.items() for start, stop in _spans(samples)]
    if len(rectangles) > MAX_RECTANGLES:
        return Cover(problem=f"it takes {len(rectangles)} rectangles, more than {MAX_RECTANGLES}")
    return Cover(tuple(sorted(rectangles)))


# Runs


def _aligned_runs(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """bool `[B, Sq]` and `[B, Sk]`: where runs start; where one begins among queries, one does among keys too."""
    mine, theirs = compared_fields(visibility)
    queries, keys = visibility.queries, visibility.keys
    starts_q = _starts(queries, mine | {"document", "cls"})
    if queries is keys and mine == theirs:
        return starts_q, starts_q
    starts_k = _starts(keys, theirs | {"document", "cls"})
    if "rank" not in mine:
        return starts_q, starts_k
    edges_q, edges_k = _edges(queries, starts_q), _edges(keys, starts_k)
    for b in range(len(starts_q)):
        starts_q[b] |= torch.isin(queries.slot[b], edges_k[b])
        starts_k[b] |= torch.isin(keys.slot[b], edges_q[b])
    return starts_q, starts_k


def _starts(axis: Axis, fields: set[str]) -> Tensor:
    start = torch.ones(axis.document.shape, dtype=torch.bool, device=axis.document.device)
    hard = torch.zeros_like(start[:, 1:])
    for name in sorted(fields - {"rank", "slot"}):
        values = getattr(axis, name)
        hard |= values[:, 1:] != values[:, :-1]
    if "rank" in fields:
        step = axis.rank.diff(dim=1)
        hard |= (step != 0) & (step != 1)
        # A run goes on as it began: the step behind its first token is the step of all.
        hard[:, 1:] |= (step[:, 1:] != step[:, :-1]) & ~hard[:, :-1]
    start[:, 1:] = hard
    return start


def _edges(axis: Axis, starts: Tensor) -> list[Tensor]:
    """For each sample the slots at which runs begin, and those behind their ends."""
    stops = torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], dim=1)
    return [torch.cat([s[a], s[e] + 1]) for s, a, e in zip(axis.slot, starts, stops, strict=True)]


def _runs(visibility: Visibility, of_queries: bool, starts: Tensor) -> tuple[Blocks, list[list[int]]]:
    """The runs as blocks of one class each, and where they begin and the last one ends, for each sample."""
    axis = visibility.queries if of_queries else visibility.keys
    used = compared_fields(visibility)[0 if of_queries else 1] | {"document"}
    samples, count = starts.shape
    edges = [[*row.nonzero().flatten().tolist(), count] for row in starts]
    most = max((len(row) for row in edges), default=1) - 1
    first = torch.tensor([row[:-1] + [-1] * (most + 1 - len(row)) for row in edges], device=starts.device)
    last = torch.tensor(
        [[i - 1 for i in row[1:]] + [-1] * (most + 1 - len(row)) for row in edges], device=starts.device
    )
    at_first, at_last = axis.gather(first.reshape(samples, most)), axis.gather(last.reshape(samples, most))
    classes = torch.arange(len(visibility.names), device=starts.device)[:, None, None]
    live = at_first.document >= 0

    def values(side: Axis, name: str) -> Tensor:
        return getattr(side, name).int().expand(len(classes), samples, most)

    blocks = Blocks(
        fields={
            "rank": at_first.rank,
            "step": at_last.rank - at_first.rank,
            "length": (last - first + 1).view_as(live),
        },
        low={name: torch.minimum(values(at_first, name), values(at_last, name)) for name in used},
        high={name: torch.maximum(values(at_first, name), values(at_last, name)) for name in used},
        present=live & (at_first.cls == classes),
        whole=live,
    )
    return blocks, edges


def _classify_runs(visibility: Visibility, queries: Blocks, keys: Blocks) -> Tensor:
    """uint8 `[B, nq, nk]` of EMPTY, FULL, CAUSAL and, if it is none of them for sure, UNKNOWN."""
    state = classify(visibility, queries, keys)
    if not bool((state == UNKNOWN).any()):
        return state
    # If a pair of runs were wholly visible were CAUSAL to hold, and not at all were it to fail, then it is causal.
    without = {
        pair: [Condition(int(term) & ~int(Condition.CAUSAL)) for term in terms]
        for pair, terms in visibility.rules.items()
    }
    lacking = {
        pair: [term for term in terms if Condition.CAUSAL not in term] for pair, terms in visibility.rules.items()
    }
    if_held, if_failed = (
        classify(Visibility(visibility.queries, visibility.keys, rules, visibility.names, visibility.window), *sides)
        for rules, sides in ((without, (queries, keys)), (lacking, (queries, keys)))
    )
    length, rank, step = ("length", "rank", "step")
    square = queries.fields[length][:, :, None] == keys.fields[length][:, None]
    square &= queries.fields[rank][:, :, None] == keys.fields[rank][:, None]
    rising = [side.fields[step] + 1 == side.fields[length] for side in (queries, keys)]
    square &= rising[0][:, :, None] & rising[1][:, None]
    causal = (state == UNKNOWN) & square & (if_held == FULL) & (if_failed == EMPTY)
    return state.masked_fill(causal, CAUSAL)


# Joining


def _join(grid: Sequence[Sequence[int]], rows: list[int], columns: list[int]) -> list[tuple[int, int, int, int, bool]]:
    """Few rectangles `(query, query_stop, key, key_stop, causal)` over the cells of one sample.

    `rows` and `columns` say where the runs begin, and where the last ends.
    """
    left = [list(row) for row in grid]
    single = [[rows[i + 1] - rows[i] == columns[j + 1] - columns[j] == 1 for j in range(len(columns) - 1)]
              for i in range(len(rows) - 1)]  # fmt: skip
    found = []
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            if left[i][j] != CAUSAL:
                continue
            size = _chain(left, single, i, j, len(rows) - 1, len(columns) - 1)
            for below in range(size):
                left[i + below][j : j + below + 1] = [EMPTY] * (below + 1)
            found.append((rows[i], rows[i + size], columns[j], columns[j + size], True))
    open_strips: dict[tuple[int, int], int] = {}
    for i in range(len(rows)):
        strips = _strips(left[i]) if i < len(rows) - 1 else []
        for strip in [strip for strip in open_strips if strip not in strips]:
            found.append((open_strips.pop(strip), rows[i], columns[strip[0]], columns[strip[1]], False))
        for strip in strips:
            open_strips.setdefault(strip, rows[i])
    return found


def _chain(left: list[list[int]], single: list[list[bool]], i: int, j: int, rows: int, columns: int) -> int:
    """How many causal cells from (i, j) on, along the diagonal, make one causal square."""
    size = 1
    while i + size < rows and j + size < columns:
        row, corner = left[i + size], j + size
        # One token sees itself: that is full and causal at once.
        closes = row[corner] == CAUSAL or (row[corner] == FULL and single[i + size][corner])
        if not closes or any(cell != FULL for cell in row[j:corner]):
            break
        size += 1
    return size


def _strips(row: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches `(start, stop)` of FULL cells."""
    edges = [False, *(cell == FULL for cell in row), False]
    starts = [i for i in range(len(row)) if edges[i + 1] and not edges[i]]
    stops = [i for i in range(1, len(row) + 1) if edges[i] and not edges[i + 1]]
    return list(zip(starts, stops, strict=True))


def _spans(samples: list[int]) -> list[tuple[int, int]]:
    """Consecutive `samples` as `(start, stop)`."""
    spans: list[tuple[int, int]] = []
    for sample in samples:
        if spans and spans[-1][1] == sample:
            spans[-1] = (spans[-1][0], sample + 1)
        else:
            spans.append((sample, sample + 1))
    return spans
