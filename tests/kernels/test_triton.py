"""The Triton kernels in the interpreter, on the CPU, against the reference: output, log-sum-exp and every gradient.

Sums are kept in float64 where the inputs are float64, so that agreement can be asked to 1e-12: a wrong bit, a row too
many or a term left out shows, and rounding does not hide it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.fusion.base import ANSWER, CLASSES, MEDIA, PROMPT, axis_of
from mmfuse.kernels import Condition, Visibility
from mmfuse.kernels.plan import BlockPlan
from mmfuse.kernels.reference import reference
from mmfuse.kernels.triton.operator import masked_attention
from mmfuse.sequence import TokenMap

pytestmark = pytest.mark.usefixtures("poisoned")

SCALE = 0.3
LENGTHS = (1, 17, 63, 65, 130, 250)
HEADS = {1: (2, 2), 2: (4, 2), 3: (3, 1), 8: (8, 1)}
HEAD_DIMS = (16, 64, 80, 96, 128, 256)
BLIND_PAIRS = ((PROMPT, MEDIA), (PROMPT, PROMPT), (ANSWER, PROMPT), (ANSWER, ANSWER))
NEAR = {(a, b): (Condition.CAUSAL, Condition.SAME_SEGMENT) for a in (PROMPT, MEDIA, ANSWER) for b in (PROMPT, MEDIA)}

#: Each strategy whose mask differs from those before it; the slow tests take a sample of all of them.
DISTINCT = ("causal", "prefix_lm", "mma", "naavit", "composite", "cross_attention")
EXTRA = ("blind media", "segments", "window", "packed")


def layout(length: int) -> list[tuple[str, int]]:
    """`length` tokens of several kinds, in runs that end anywhere but on a block's border."""
    shares = [("text", 0.11), ("image", 0.31), ("text", 0.17), ("image", 0.23), ("answer", 0.18)]
    runs = [(kind, int(share * length)) for kind, share in shares]
    rest = length - sum(count for _, count in runs)
    return [(kind, count) for kind, count in [("text", rest), *runs] if count]


def visibility_of(rule: str, length: int) -> Visibility:
    """Two samples, the second one shorter and padded on the left; `packed` is one sample of two documents."""
    maps = [TokenMap.from_layout(layout(size)) for size in (length, max(1, length // 3))]
    tokens = TokenMap.batch(maps, side="left")
    if rule == "packed":
        first = max(1, length // 3)
        pieces = [TokenMap.from_layout(layout(size)) for size in (first, length - first) if size]
        return FUSIONS["mma"]().visibility(TokenMap.pack(pieces))
    if rule == "window":
        return FUSIONS["causal"]().visibility(tokens).view(window=40, keys=length)
    rules = {"blind media": dict.fromkeys(BLIND_PAIRS, (Condition.CAUSAL,)), "segments": NEAR}
    if rule in rules:
        return Visibility(axis_of(tokens), axis_of(tokens), rules[rule], CLASSES)
    return FUSIONS[rule]().visibility(tokens)


class Case(NamedTuple):
    rule: str
    length: int
    group: int
    head_dim: int
    mass: bool
    blocks: tuple[int, int]

    def __str__(self) -> str:
        blocks = "x".join(map(str, self.blocks))
        return f"{self.rule}-S{self.length}-G{self.group}-D{self.head_dim}-{'mass' if self.mass else 'plain'}-{blocks}"


def covering(factors: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows in which every pair of values of two factors occurs, found greedily.

    Values stand in the order of their cost: of those that cover something new the cheapest is taken.
    """
    axes = list(itertools.combinations(range(len(factors)), 2))
    missing = dict.fromkeys((i, a, j, b) for i, j in axes for a in factors[i] for b in factors[j])
    rows = []
    while missing:
        i, a, j, b = next(reversed(missing))
        row = {i: a, j: b}
        for f in (f for f in range(len(factors)) if f not in row):
            known = list(row.items())
            new = (value for value in factors[f] if any(_pair(f, value, g, y) in missing for g, y in known))
            row[f] = next(new, factors[f][0])
        for i, j in axes:
            missing.pop((i, row[i], j, row[j]), None)
        rows.append(tuple(row[f] for f in range(len(factors))))
    return rows


def _pair(i: int, a: Any, j: int, b: Any) -> tuple[int, Any, int, Any]:
    return (i, a, j, b) if i < j else (j, b, i, a)


SHAPES = ((64, 64), (128, 64), (64, 128))
PAIRWISE = [Case(*row) for row in covering([DISTINCT + EXTRA, LENGTHS, tuple(HEADS), HEAD_DIMS, (False, True), SHAPES])]
FULL = [
    *(Case(rule, length, group, HEAD_DIMS[i % 6], i % 2 == 0, SHAPES[i % 3])
      for i, (rule, length, group) in enumerate(itertools.product((*FUSIONS, *EXTRA), LENGTHS, HEADS))),
    *(Case((*FUSIONS, *EXTRA)[i % 13], length, group, head_dim, i % 2 == 0, SHAPES[i % 3])
      for i, (length, group, head_dim) in enumerate(itertools.product(LENGTHS, HEADS, HEAD_DIMS))),
]  # fmt: skip

#: Every 22nd case is a slow one; the others are exhaustive as well.
SAMPLED = [pytest.param(case, marks=[pytest.mark.exhaustive] if i % 22 else []) for i, case in enumerate(FULL)]


def guarded(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[B, H, S, D]` of random numbers amid NaN, as a transposed view: rows lie neither together nor aligned."""
    batch, heads, length, head_dim = shape
    around = torch.full((batch, length + 8, heads, head_dim + 5), torch.nan, dtype=dtype)
    inner = around[:, 4:-4, :, 2:-3]
    inner.copy_(torch.randn(inner.shape, dtype=torch.float64))
    return inner.transpose(1, 2)


def close(mine: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def log_sum_exp(q: Tensor, k: Tensor, seen: Tensor, mass: Tensor | None) -> Tensor:
    """Of the scores that each row sees, and its mass; -inf where that is nothing."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * SCALE
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    rows = (
        torch.full_like(scores[..., :1], -torch.inf)
        if mass is None
        else mass[:, None, :, None].expand_as(scores[..., :1])
    )
    return torch.cat([scores, rows], dim=-1).logsumexp(-1)


def check(case: Case, by_force: Callable[..., BlockPlan]) -> None:
    visibility = visibility_of(case.rule, case.length)
    batch, queries, keys = visibility.shape
    heads, key_heads = HEADS[case.group]
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    q, k, v = (guarded(batch, count, length, case.head_dim).requires_grad_() for count, length in sizes)
    mass = torch.randn(batch, queries, dtype=torch.float64).requires_grad_() if case.mass else None
    seen = visibility.dense()
    plan = by_force(seen, *case.blocks)
    out, lse, _ = masked_attention(q, k, v, plan, scale=SCALE, mass=mass)
    expected = reference(q, k, v, visibility, SCALE, mass)
    expected_lse = log_sum_exp(q, k, seen, mass)
    close([out, lse], [expected, expected_lse])
    inputs = [x for x in (q, k, v, mass) if x is not None]
    live = torch.isfinite(expected_lse)
    direction, direction_lse = torch.randn_like(out), torch.randn(int(live.sum()), dtype=torch.float64)
    mine = torch.autograd.grad([out, lse[live]], inputs, [direction, direction_lse])
    close(mine, torch.autograd.grad([expected, expected_lse[live]], inputs, [direction, direction_lse]))
    if mass is None:
        dead = visibility.dead_rows()[:, None].expand(-1, heads, -1)
        assert torch.equal(out[dead], torch.zeros_like(out[dead]))
        assert torch.equal(mine[0][dead], torch.zeros_like(out[dead]))


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_kernels_equal_the_reference(case: Case, by_force: Callable[..., BlockPlan]) -> None:
    check(case, by_force)


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_kernels_equal_the_reference_everywhere(case: Case, by_force: Callable[..., BlockPlan]) -> None:
    check(case, by_force)


def test_pairwise_covers_every_pair() -> None:
    for i, j in itertools.combinations(range(len(Case._fields)), 2):
        wanted = {(a, b) for a in {c[i] for c in FULL} & {c[i] for c in PAIRWISE} for b in {c[j] for c in PAIRWISE}}
        assert wanted <= {(case[i], case[j]) for case in PAIRWISE}
    for field, values in (("length", LENGTHS), ("group", HEADS), ("head_dim", HEAD_DIMS), ("blocks", SHAPES)):
        assert {getattr(case, field) for case in PAIRWISE} == set(values)


def test_the_distinct_rules_are_all_the_strategies_masks() -> None:
    masks = {rule: visibility_of(rule, 63).dense().numpy().tobytes() for rule in FUSIONS}
    assert {masks[rule] for rule in DISTINCT} == set(masks.values())
