"""Rectangles: disjoint, and together exactly the mask; attention over them is exact, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.kernels import BackendError, Condition, Visibility, attend, rectangle_cover
from mmfuse.kernels.rectangles import Cover
from mmfuse.sequence import TokenMap

kinds = st.sampled_from(["text", "image", "audio", "answer"])
layouts = st.lists(st.tuples(kinds, st.integers(1, 9)), min_size=1, max_size=6)
LONG = [("text", 32), ("image", 576), ("text", 416)]


def tokens_of(runs: list, arrangement: str) -> TokenMap:
    maps = [TokenMap.from_layout(layout) for layout in runs]
    return TokenMap.pack(maps) if arrangement == "pack" else TokenMap.batch(maps, side=arrangement)


def counted(cover: Cover, shape: tuple[int, int, int]) -> Tensor:
    """How many rectangles hold each pair."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for part in cover.rectangles:
        rows, columns = part.query_stop - part.query, part.key_stop - part.key
        inside = torch.ones(rows, columns, dtype=torch.int64)
        where = (slice(part.sample, part.sample_stop), slice(part.query, part.query_stop))
        counts[(*where, slice(part.key, part.key_stop))] += inside.tril() if part.causal else inside
    return counts


@settings(max_examples=300)
@given(
    runs=st.lists(layouts, min_size=1, max_size=3),
    name=st.sampled_from(list(FUSIONS)),
    arrangement=st.sampled_from(["left", "right", "pack"]),
    start=st.integers(0, 12),
    dropped=st.integers(0, 12),
    window=st.one_of(st.none(), st.integers(1, 60)),
)
def test_rectangles_are_the_mask(
    runs: list, name: str, arrangement: str, start: int, dropped: int, window: int | None
) -> None:
    whole = FUSIONS[name]().visibility(tokens_of(runs, arrangement))
    length = whole.shape[1]
    visibility = whole.rows(min(start, length - 1)).view(window=window, keys=max(1, length - dropped))
    cover = rectangle_cover(visibility)
    if cover.problem is None:
        assert torch.equal(counted(cover, visibility.shape), visibility.dense().long())
        assert cover.pairs == int(visibility.dense().sum())
    else:
        assert cover.rectangles == ()


@pytest.mark.parametrize(
    ("name", "count"), [("causal", 1), ("naavit", 3), ("mma", 2), ("prefix_lm", 1), ("moda", 1), ("saisa", 3)]
)
def test_as_few_as_there_are(name: str, count: int) -> None:
    assert len(rectangle_cover(FUSIONS[name]().visibility(TokenMap.from_layout(LONG))).rectangles) == count


def test_equal_samples_share_a_rectangle() -> None:
    tokens = TokenMap.from_layout(LONG).repeat(3)
    (only,) = rectangle_cover(FUSIONS["causal"]().visibility(tokens)).rectangles
    assert only == (0, 3, 0, 1024, 0, 1024, True)


def test_what_is_no_rectangle_is_refused() -> None:
    tokens = TokenMap.from_layout([("text", 4), ("image", 6), ("text", 8)])
    q = torch.randn(1, 2, 18, 8)
    windowed = FUSIONS["causal"]().visibility(tokens).view(window=3, keys=18)
    for visibility in (windowed, FUSIONS["composite"]().visibility(tokens)):
        with pytest.raises(
            BackendError, match=r"window or SELF cuts them\)\. Backends that can: reference, sdpa, flex"
        ):
            attend(q, q, q, visibility, backend="rectangles")
    axis = windowed.queries
    empty = Visibility(axis, axis, {(0, 0): [Condition.SAME_SEGMENT]}, ["never seen", "text", "answer"])
    assert torch.equal(attend(q, q, q, empty, backend="rectangles")[:, :, :4], torch.zeros(1, 2, 4, 8))


@pytest.mark.parametrize("name", ["naavit", "mma", "prefix_lm", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_long_sequences_merge_exactly(name: str, dtype: torch.dtype) -> None:
    """Longer than a block of the fused kernel; an error of low precision is that of a dense mask, or near it."""
    torch.manual_seed(0)
    visibility = FUSIONS[name]().visibility(TokenMap.from_layout([("text", 32), ("image", 300), ("text", 300)]))
    exact = [torch.randn(1, heads, 632, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    direction = torch.randn(1, 4, 632, 16, dtype=torch.float64)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        out = attend(*inputs, visibility, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(dtype))]

    wanted = run("reference", torch.float64)
    dense, mine = run("sdpa", dtype), run("rectangles", dtype)
    for truth, usual, ours in zip(wanted, dense, mine, strict=True):
        assert ours.dtype == dtype
        error, bound = (float((x.double() - truth).abs().max()) for x in (ours, usual))
        assert error <= 2 * bound + 1e-12
