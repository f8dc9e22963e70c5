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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmfuse.kernels.tiles import EMPTY, FULL, UNKNOWN, compared_fields
from mmfuse.kernels.visibility import COMPARED, Axis, Condition, Visibility

CAUSAL = 3

Array = NDArray[Any]

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
    if any(Condition.WINDOW_2D in conjunction for conjunction in visibility.pairs_by_conjunction()):
        return Cover(problem="a window over a grid cuts it into single tokens")
    starts_q, starts_k = _aligned_starts(visibility)
    longest = max(int(starts_q.sum(1).max()), int(starts_k.sum(1).max())) if starts_q.size else 0
    if longest > _MAX_RUNS:
        return Cover(
            problem=f"a sample has {longest} runs of tokens, and more than {_MAX_RUNS} make too many rectangles"
        )
    mine, theirs = compared_fields(visibility)
    queries, keys = _Runs.of(visibility.queries, mine, starts_q), _Runs.of(visibility.keys, theirs, starts_k)
    state = _classify(visibility, queries, keys)
    if (state == UNKNOWN).any():
        return Cover(problem="some of its parts are neither full, nor empty, nor causal (a window or SELF cuts them)")
    found: dict[tuple[int, int, int, int, bool], list[int]] = defaultdict(list)
    for sample, grid in enumerate(state.tolist()):
        for rectangle in _join(grid, queries.edges[sample], keys.edges[sample]):
            found[rectangle].append(sample)
    rectangles = [Rectangle(start, stop, *where) for where, samples in found.items() for start, stop in _spans(samples)]
    if len(rectangles) > MAX_RECTANGLES:
        return Cover(problem=f"it takes {len(rectangles)} rectangles, more than {MAX_RECTANGLES}")
    return Cover(tuple(sorted(rectangles)))


# Runs. They are few and their arrays small, where a call of NumPy costs a fraction of one of torch: a cover that is not
# used, because a dense mask is cheaper, must cost next to nothing.


def _array(axis: Axis, name: str) -> Array:
    return getattr(axis, name).numpy(force=True)


def _aligned_starts(visibility: Visibility) -> tuple[Array, Array]:
    """bool `[B, Sq]` and `[B, Sk]`: where runs start; where one begins among queries, one does among keys too."""
    mine, theirs = compared_fields(visibility)
    queries, keys = visibility.queries, visibility.keys
    starts_q = _starts(queries, mine | {"document", "cls"})
    if queries is keys and mine == theirs:
        return starts_q, starts_q
    starts_k = _starts(keys, theirs | {"document", "cls"})
    if "rank" not in mine:
        return starts_q, starts_k
    slots_q, slots_k = _array(queries, "slot"), _array(keys, "slot")
    edges_q, edges_k = _edge_slots(slots_q, starts_q), _edge_slots(slots_k, starts_k)
    for b in range(len(starts_q)):
        starts_q[b] |= np.isin(slots_q[b], edges_k[b])
        starts_k[b] |= np.isin(slots_k[b], edges_q[b])
    return starts_q, starts_k


def _starts(axis: Axis, fields: set[str]) -> Array:
    start = np.ones(tuple(axis.document.shape), dtype=bool)
    hard = np.zeros_like(start[:, 1:])
    for name in sorted(fields - {"rank", "slot"}):
        values = _array(axis, name)
        hard |= values[:, 1:] != values[:, :-1]
    if "rank" in fields:
        step = np.diff(_array(axis, "rank"), axis=1)
        hard |= (step != 0) & (step != 1)
        # A run goes on as it began: the step behind its first token is the step of all.
        hard[:, 1:] |= (step[:, 1:] != step[:, :-1]) & ~hard[:, :-1]
    start[:, 1:] = hard
    return start


def _edge_slots(slots: Array, starts: Array) -> list[Array]:
    """For each sample the slots at which runs begin, and those behind their ends."""
    stops = np.concatenate([starts[:, 1:], np.ones_like(starts[:, :1])], axis=1)
    return [np.concatenate([s[a], s[e] + 1]) for s, a, e in zip(slots, starts, stops, strict=True)]


@dataclass(frozen=True)
class _Runs:
    """The runs of one axis: arrays `[B, n]`, filled up with runs of padding.

    Attributes:
        edges: for each sample where its runs begin, and where the last one ends.
        low: the smallest value of each compared field in a run; `high` the largest.
        live: whether the run is no padding.
        cls: its class.
        length: its tokens.
        rank: of its first token.
        rises: whether ranks count up by one from there.
    """

    edges: list[list[int]]
    low: dict[str, Array]
    high: dict[str, Array]
    live: Array
    cls: Array
    length: Array
    rank: Array
    rises: Array

    @staticmethod
    def of(axis: Axis, compared: set[str], starts: Array) -> _Runs:
        count = starts.shape[1]
        edges = [[*row.nonzero()[0].tolist(), count] for row in starts]
        most = max((len(row) for row in edges), default=1) - 1
        first = np.array([row[:-1] + [-1] * (most + 1 - len(row)) for row in edges], dtype=np.int64)
        last = np.array([[i - 1 for i in row[1:]] + [-1] * (most + 1 - len(row)) for row in edges], dtype=np.int64)
        first, last = first.reshape(len(edges), most), last.reshape(len(edges), most)
        absent = first < 0

        def at(name: str, where: Array) -> Array:
            return np.take_along_axis(_array(axis, name), np.where(absent, 0, where), axis=1)

        ends = {name: (at(name, first), at(name, last)) for name in compared | {"document", "rank"}}
        length = last - first + 1
        return _Runs(
            edges,
            low={name: np.minimum(*pair) for name, pair in ends.items()},
            high={name: np.maximum(*pair) for name, pair in ends.items()},
            live=(ends["document"][0] >= 0) & ~absent,
            cls=at("cls", first),
            length=length,
            rank=ends["rank"][0],
            rises=ends["rank"][1] - ends["rank"][0] + 1 == length,
        )


class _Pairs:
    """Runs of queries against runs of keys: what three-valued logic says of each pair, `[B, nq, nk]`."""

    def __init__(self, visibility: Visibility, queries: _Runs, keys: _Runs) -> None:
        self._visibility, self._queries, self._keys = visibility, queries, keys
        self._known: dict[Condition, tuple[Array, Array]] = {}
        same = queries.low["document"][:, :, None] == keys.low["document"][:, None]
        self._same = same & (queries.live[:, :, None] & keys.live[:, None])

    def _bounds(self, mine: str, theirs: str) -> tuple[Array, Array]:
        """The smallest and the largest difference between the field of a query and that of a key."""
        low = self._queries.low[mine][:, :, None] - self._keys.high[theirs][:, None]
        return low, self._queries.high[mine][:, :, None] - self._keys.low[theirs][:, None]

    def _holds(self, condition: Condition) -> tuple[Array, Array]:
        """Where the condition holds for all pairs of tokens, and where it may hold for some."""
        if condition not in self._known:
            (each,) = COMPARED[condition]
            low, high = self._bounds(each.mine, each.theirs)
            if condition is Condition.CAUSAL:
                self._known[condition] = low >= 0, high >= 0
            else:
                self._known[condition] = (low == 0) & (high == 0), (low <= 0) & (high >= 0)
        return self._known[condition]

    def visible(self, causal: bool | None = None) -> tuple[Array, Array]:
        """Where all pairs of tokens are visible, and where some may be; `causal` says that CAUSAL held, or failed."""
        visibility = self._visibility
        every, some = np.zeros_like(self._same), np.zeros_like(self._same)
        for conjunction, pairs in visibility.pairs_by_conjunction().items():
            if causal is False and Condition.CAUSAL in conjunction:
                continue
            table = np.zeros((len(visibility.names), len(visibility.names)), dtype=bool)
            table[tuple(np.array(pairs).T)] = True
            always = table[self._queries.cls[:, :, None], self._keys.cls[:, None]]
            maybe = always
            for condition in COMPARED:
                if condition in conjunction and not (causal and condition is Condition.CAUSAL):
                    holds, may_hold = self._holds(condition)
                    always, maybe = always & holds, maybe & may_hold
            every, some = every | always, some | maybe
        every, some = every & self._same, some & self._same
        if visibility.window is not None:
            low, high = self._bounds("slot", "slot")
            every &= (low > -visibility.window) & (high < visibility.window)
            some &= (low < visibility.window) & (high > -visibility.window)
        return every, some


def _classify(visibility: Visibility, queries: _Runs, keys: _Runs) -> Array:
    """`[B, nq, nk]` of EMPTY, FULL, CAUSAL and, if it is none of them for sure, UNKNOWN."""
    pairs = _Pairs(visibility, queries, keys)
    every, some = pairs.visible()
    state = np.where(every, FULL, np.where(some, UNKNOWN, EMPTY))
    if not (state == UNKNOWN).any():
        return state
    # If a pair of runs were wholly visible were CAUSAL to hold, and not at all were it to fail, then it is causal.
    square = queries.length[:, :, None] == keys.length[:, None]
    square &= queries.rank[:, :, None] == keys.rank[:, None]
    square &= queries.rises[:, :, None] & keys.rises[:, None]
    causal = square & pairs.visible(causal=True)[0] & ~pairs.visible(causal=False)[1]
    return np.where((state == UNKNOWN) & causal, CAUSAL, state)


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
