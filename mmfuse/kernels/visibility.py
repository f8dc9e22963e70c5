"""Visibility: who may attend to whom, as data of size O(S) and not as an S×S tensor.

Every token has a few integers (document, rank, segment, turn, class, slot), and a table of rules says for each pair
(query class, key class) under which conditions the query sees the key. Tokens of different documents never see each
other; padding sees nothing and is seen by nobody; a pair that is missing from the table means never.

Shapes: `B` samples, `Sq` queries, `Sk` keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntFlag
from os import PathLike
from types import MappingProxyType
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor


class Condition(IntFlag):
    """What must hold between a query and a key. Conditions joined by `|` must all hold."""

    ALWAYS = 0
    CAUSAL = 1  # rank of the query >= rank of the key
    SELF = 2  # the same slot
    SAME_SEGMENT = 4
    SAME_TURN = 8
    REF_SEGMENT = 16  # the key lies in the segment that the query refers to
    WINDOW_2D = 32  # the key's place in its grid lies in the window of the query's; see `neighbourhood`


Rules = Mapping[tuple[int, int], Sequence[Condition]]


class Comparison(NamedTuple):
    """A field of the query against one of the key: `>=` for AT_LEAST, `<=` for AT_MOST, `==` for EQUAL."""

    mine: str
    relation: str
    theirs: str

    def __call__(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self.relation == AT_LEAST:
            return mine >= theirs
        return mine <= theirs if self.relation == AT_MOST else mine == theirs


AT_LEAST, AT_MOST, EQUAL = "at least", "at most", "equal"

#: What each condition compares; all of it must hold.
COMPARED: Mapping[Condition, tuple[Comparison, ...]] = MappingProxyType(
    {
        Condition.CAUSAL: (Comparison("rank", AT_LEAST, "rank"),),
        Condition.SELF: (Comparison("slot", EQUAL, "slot"),),
        Condition.SAME_SEGMENT: (Comparison("segment", EQUAL, "segment"),),
        Condition.SAME_TURN: (Comparison("turn", EQUAL, "turn"),),
        Condition.REF_SEGMENT: (Comparison("ref", EQUAL, "segment"),),
        Condition.WINDOW_2D: (
            Comparison("top", AT_MOST, "y"),
            Comparison("bottom", AT_LEAST, "y"),
            Comparison("left", AT_MOST, "x"),
            Comparison("right", AT_LEAST, "x"),
        ),
    }
)


def comparisons(conjunction: Condition) -> list[Comparison]:
    """What the conditions of a conjunction compare."""
    return [each for condition, parts in COMPARED.items() if condition in conjunction for each in parts]


#: Classes that a rule table may speak of, so that a set of classes fits into a byte.
MAX_CLASSES = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """What the rules need to know of each token on one side: integer tensors `[B, N]`.

    Attributes:
        document: -1 marks padding.
        rank: causal order inside the document; equal ranks see each other under CAUSAL.
        segment: as in `TokenMap`.
        turn: as in `TokenMap`.
        cls: the token class that the rule table speaks of.
        slot: the place in the sequence; SELF and sliding windows are measured in it.
        ref: the segment that the token may attend to under REF_SEGMENT (-1: none).
        y: row of the token in its grid, as keys are looked for under WINDOW_2D; see `neighbourhood`.
        x: column, likewise.
        top: the first row that the token sees under WINDOW_2D.
        bottom: the last one.
        left: the first column.
        right: the last one.
    The last six are None where no rule asks for WINDOW_2D.
    """

    document: Tensor
    rank: Tensor
    segment: Tensor
    turn: Tensor
    cls: Tensor
    slot: Tensor
    ref: Tensor
    y: Tensor | None = None
    x: Tensor | None = None
    top: Tensor | None = None
    bottom: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def columns(self, start: int, stop: int | None = None) -> Axis:
        return Axis(**{name: value[:, start:stop] for name, value in self._tensors().items()})

    def gather(self, index: Tensor) -> Axis:
        """The tokens at `index [B, N']`, in that order; an index of -1 gives padding."""
        taken = {name: value.gather(1, index.clamp(min=0)) for name, value in self._tensors().items()}
        return Axis(**{**taken, "document": taken["document"].masked_fill(index < 0, -1)})

    def to(self, device: torch.device | str) -> Axis:
        return Axis(**{name: value.to(device) for name, value in self._tensors().items()})

    def followed_by(self, other: Axis) -> Axis:
        """These tokens and the `other` ones behind them.

        Raises:
            ValueError: one side has places in a grid and the other has none.
        """
        mine, theirs = self._tensors(), other._tensors()
        if mine.keys() != theirs.keys():
            raise ValueError(f"one of two axes lacks {', '.join(sorted(mine.keys() ^ theirs.keys()))}")
        return Axis(**{name: torch.cat([mine[name], theirs[name]], 1) for name in mine})

    def __len__(self) -> int:
        return int(self.document.shape[1])


class Visibility:
    """Which keys each query may attend to.

    Args:
        queries: the tokens that ask, `Sq` of them.
        keys: the tokens that answer, `Sk` of them.
        rules: `{(query class, key class): [conjunction, ...]}`; a pair is visible if any conjunction holds.
        names: what the classes are called, for pictures.
        window: if given, a query sees only keys fewer than `window` slots away, as in sliding-window layers.
    """

    def __init__(
        self,
        queries: Axis,
        keys: Axis,
        rules: Rules,
        names: Sequence[str],
        window: int | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 slot, got {window}")
        if len(names) > MAX_CLASSES:
            raise ValueError(f"a Visibility has at most {MAX_CLASSES} token classes, got {len(names)}")
        for pair in rules:
            if not all(0 <= cls < len(names) for cls in pair):
                raise ValueError(f"rule {pair} speaks of a class outside 0..{len(names) - 1} ({', '.join(names)})")
        used = [each for terms in rules.values() for term in terms for each in comparisons(term)]
        if any(getattr(queries, c.mine) is None or getattr(keys, c.theirs) is None for c in used):
            raise ValueError("a rule asks for WINDOW_2D, but the tokens have no window: see kernels.neighbourhood")
        self.queries = queries
        self.keys = keys
        self.rules = dict(rules)
        self.names = tuple(names)
        self.window = window
        # Every layer of a decoder asks for the same lowered forms; they are made once a batch.
        self._memo: dict[Hashable, object] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B, Sq, Sk)`."""
        return self.queries.document.shape[0], len(self.queries), len(self.keys)

    # Views

    def to(self, device: torch.device | str) -> Visibility:
        """The same mask on another device."""
        return Visibility(self.queries.to(device), self.keys.to(device), self.rules, self.names, self.window)

    def rows(self, start: int) -> Visibility:
        """Only the queries from slot column `start` on, against all keys: what a decoding step asks."""
        return self._view(("rows", start), queries=self.queries.columns(start))

    def select(self, queries: Tensor, keys: Tensor | None = None) -> Visibility:
        """Only the queries at `queries [B, Sq']` and the keys at `keys [B, Sk']` (all if None); -1 gives padding."""
        return Visibility(
            self.queries.gather(queries),
            self.keys if keys is None else self.keys.gather(keys),
            self.rules,
            self.names,
            self.window,
        )

    def view(self, *, window: int | None, keys: int) -> Visibility:
        """This visibility inside a layer with a sliding `window` whose cache kept only the last `keys` keys."""
        if keys > len(self.keys):
            raise ValueError(f"{keys} keys were given, but the visibility knows only {len(self.keys)}")
        if window == self.window and keys == len(self.keys):
            return self
        return self._view(("view", window, keys), keys=self.keys.columns(len(self.keys) - keys), window=window)

    def _view(self, name: Hashable, **changes: object) -> Visibility:
        parts = {"queries": self.queries, "keys": self.keys, "window": self.window, **changes}
        return self.remember(name, lambda: Visibility(rules=self.rules, names=self.names, **parts))  # type: ignore[arg-type]

    # Lowered forms

    def remember(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for each `name`: all layers of a batch share one lowered form."""
        if name not in self._memo:
            self._memo[name] = make()
        return cast(T, self._memo[name])

    def dense(self) -> Tensor:
        """The mask itself: bool `[B, Sq, Sk]`, True where the query sees the key. This is the law."""
        return self.remember("dense", self._dense)

    def _dense(self) -> Tensor:
        query, key = self.queries, self.keys
        seen = torch.zeros(self.shape, dtype=torch.bool, device=query.document.device)
        for conjunction, pairs in self.pairs_by_conjunction().items():
            allowed = self._holds(conjunction)
            if len(pairs) < len(self.names) ** 2:
                table = torch.zeros(len(self.names), len(self.names), dtype=torch.bool, device=seen.device)
                for pair in pairs:
                    table[pair] = True
                allowed = allowed & table[query.cls.unsqueeze(2), key.cls.unsqueeze(1)]
            seen |= allowed
        seen &= query.document.unsqueeze(2) == key.document.unsqueeze(1)
        seen &= (query.document >= 0).unsqueeze(2)
        if self.window is not None:
            seen &= (query.slot.unsqueeze(2) - key.slot.unsqueeze(1)).abs() < self.window
        return seen

    def pairs_by_conjunction(self) -> dict[Condition, list[tuple[int, int]]]:
        """For each conjunction in the rule table the class pairs that it is given for."""
        groups: dict[Condition, list[tuple[int, int]]] = {}
        for pair, conjunctions in self.rules.items():
            for conjunction in set(conjunctions):
                groups.setdefault(conjunction, []).append(pair)
        return groups

    def _holds(self, conjunction: Condition) -> Tensor:
        query, key = self.queries, self.keys
        held = torch.ones(self.shape, dtype=torch.bool, device=query.document.device)
        for each in comparisons(conjunction):
            held &= each(getattr(query, each.mine).unsqueeze(2), getattr(key, each.theirs).unsqueeze(1))
        return held

    def dead_rows(self) -> Tensor:
        """bool `[B, Sq]`: queries that see nothing; attention gives them 0."""
        return self.remember("dead", lambda: ~self.dense().any(dim=2))

    def is_causal(self) -> bool:
        """Whether every live row sees exactly itself and the slots before it, found without an S×S tensor.

        True only if queries and keys are the same slots, each row is one document with padding behind it, and the
        rule for every pair of classes that occurs is CAUSAL alone.
        """
        return self.remember("causal", self._is_causal)

    def _is_causal(self) -> bool:
        query, key = self.queries, self.keys
        compared = ("document", "rank", "cls", "slot")
        if not all(torch.equal(getattr(query, name), getattr(key, name)) for name in compared):
            return False
        if self.window is not None and self.window < len(key):
            return False
        live = key.document >= 0
        ordered = (key.rank[:, 1:] > key.rank[:, :-1]) | ~live[:, 1:]
        one_document = (key.document == key.document[:, :1]) | ~live
        padded_behind = live[:, :-1] | ~live[:, 1:]
        if not bool(ordered.all() & one_document.all() & padded_behind.all()):
            return False
        present = torch.unique(key.cls[live]).tolist()
        causal = [self.rules.get((q, k)) for q in present for k in present]
        return all(rule is not None and set(rule) == {Condition.CAUSAL} for rule in causal)

    def is_full(self) -> bool:
        """Whether every query sees every key, so that no mask is needed (the usual decoding step)."""
        return self.remember("full", lambda: len(self.queries) == 1 and bool(self.dense().all()))

    # Pictures

    def __str__(self) -> str:
        from mmfuse.kernels.drawing import ascii_mask

        return ascii_mask(self)

    def plot(self, path: str | PathLike[str], sample: int = 0) -> None:
        """Write the mask of one sample as a picture; the format follows the file's suffix."""
        from mmfuse.kernels.drawing import plot_mask

        plot_mask(self, path, sample)
