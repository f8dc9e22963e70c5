"""2-D windows: the definition token by token, and every backend that can express them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfuse.fusion.base import CAUSAL_RULES, CLASSES, MEDIA, axis_of
from mmfuse.kernels import BackendError, Condition, Visibility, attend, plan_blocks
from mmfuse.kernels.neighbourhood import Window2D
from mmfuse.kernels.order import squares, tile_order
from mmfuse.sequence import TokenMap
from mmfuse.testing import backends_here

RULES = {**CAUSAL_RULES, (MEDIA, MEDIA): (Condition.WINDOW_2D | Condition.SAME_SEGMENT,)}


def on_grid(*shapes: tuple[int, int]) -> TokenMap:
    """Two tokens of text, and behind them an image of each shape and one more token of text."""
    tokens = TokenMap.from_layout([("text", 2), *(run for h, w in shapes for run in (("image", h * w), ("text", 1)))])
    places = [(0, 0, 0)] * 2
    for height, width in shapes:
        places += [(0, y, x) for y in range(height) for x in range(width)] + [(0, 0, 0)]
    return replace(tokens, grid=torch.tensor([places]))


def of_image(side: int, size: int) -> Visibility:
    """An image alone, each place of which sees `size` × `size`."""
    tokens = TokenMap.from_layout([("image", side * side)])
    places = torch.tensor([[(0, y, x) for y in range(side) for x in range(side)]])
    axis = axis_of(replace(tokens, grid=places), window=Window2D((size, size)))
    return Visibility(axis, axis, RULES, CLASSES)


def neighbours(place: int, extent: int, size: int, stride: int, dilation: int) -> set[int]:
    """The definition along one side of the grid: a list of places is cut, nothing is computed."""
    alike = [other for other in range(extent) if other % dilation == place % dilation]
    group = alike.index(place) // stride
    members = alike[group * stride : (group + 1) * stride]
    leader = alike.index(members[stride // 2] if stride // 2 < len(members) else members[-1])
    begin = leader - size // 2
    while begin + size > len(alike):
        begin -= 1
    begin = max(begin, 0)
    return set(alike[begin : begin + size])


numbers = st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def windows(draw: st.DrawFn) -> Window2D:
    size = draw(numbers)
    stride = (draw(st.integers(1, size[0])), draw(st.integers(1, size[1])))
    return Window2D(size, stride, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))))


@settings(max_examples=100)
@given(shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=2), window=windows())
def test_the_mask_is_the_definition_and_the_plan_is_the_mask(shapes: list[tuple[int, int]], window: Window2D) -> None:
    tokens = on_grid(*shapes)
    axis = axis_of(tokens, window=window)
    visibility = Visibility(axis, axis, RULES, CLASSES)
    expected = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    start = 2
    for height, width in shapes:
        places = [(y, x) for y in range(height) for x in range(width)]
        seen = torch.tensor(
            [
                [
                    y in neighbours(qy, height, window.size[0], window.stride[0], window.dilation[0])
                    and x in neighbours(qx, width, window.size[1], window.stride[1], window.dilation[1])
                    for y, x in places
                ]
                for qy, qx in places
            ]
        )
        stop = start + height * width
        expected[start:stop][:, tokens.is_media[0]] = False
        expected[start:stop, start:stop] = seen
        start = stop + 1
    assert torch.equal(visibility.dense()[0], expected)
    for block_q, block_k in ((64, 64), (8, 16)):
        plan = plan_blocks(visibility, block_q, block_k)
        assert torch.equal(plan.dense()[0], expected) and torch.equal(plan.dense(by_key=True)[0], expected)


@pytest.mark.parametrize(
    ("side", "size", "before", "after"), [(96, 13, 2922, 1156), (64, 17, 1088, 576), (48, 13, 386, 256)]
)
def test_squares_fill_fewer_tiles_of_large_grids(side: int, size: int, before: int, after: int) -> None:
    visibility = of_image(side, size)
    order = tile_order(visibility)
    assert order is not None and order.order.sort().values.equal(torch.arange(side**2)[None])
    plans = plan_blocks(visibility), plan_blocks(order.visibility)
    assert [plan.full + plan.partial for plan in plans] == [before, after]


def test_small_grids_keep_their_order() -> None:
    assert tile_order(of_image(24, 7)) is None
    plain = axis_of(on_grid((64, 64)))
    assert tile_order(Visibility(plain, plain, CAUSAL_RULES, CLASSES)) is None


def test_text_stays_where_it_is_and_each_grid_among_itself() -> None:
    window = Window2D((3, 3), (2, 1), (1, 2))
    axis = axis_of(TokenMap.pack([on_grid((20, 30)), on_grid((9, 4), (17, 10))]), window=window)
    visibility = Visibility(axis, axis, RULES, CLASSES)
    order = squares(visibility)[0]
    moved = axis.gather(order[None])
    for name in ("document", "segment", "cls"):
        assert torch.equal(getattr(moved, name), getattr(axis, name)), name
    assert axis.y is not None
    text = axis.y[0] < 0
    assert torch.equal(order[text], torch.arange(len(order))[text])
    mask = visibility.dense()[0]
    assert torch.equal(visibility.select(order[None], order[None]).dense()[0], mask[order][:, order])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_attention_in_tile_order_is_attention(backend: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With text and padding around the grids; output, and gradients where there are any. Small grids must do here."""
    monkeypatch.setattr("mmfuse.kernels.order.WORTH_IT", 9.0)
    tokens = TokenMap.batch([on_grid((11, 13)), on_grid((6, 6))], side="left")
    axis = axis_of(tokens, window=Window2D((5, 5)))
    visibility = Visibility(axis, axis, RULES, CLASSES)
    assert tile_order(visibility) is not None
    learns = backend != "flex"
    q, k, v = (torch.randn(2, heads, len(tokens), 8, requires_grad=learns) for heads in (2, 1, 1))
    mass = torch.randn(2, len(tokens), requires_grad=learns)
    add = torch.randn(2, len(CLASSES), len(CLASSES), requires_grad=learns) if bias else None
    inputs = [x for x in (q, k, v, mass, add) if x is not None]
    direction = torch.randn_like(q)
    found = []
    for name in (backend, "sdpa"):
        out = attend(q, k, v, visibility, mass=mass, bias=add, backend=name)
        found.append([out, *(torch.autograd.grad(out, inputs, direction) if learns else ())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("backend", backends_here())
def test_backends_agree_or_refuse(backend: str) -> None:
    maps = [on_grid((6, 6)), on_grid((4, 5), (3, 3))]
    for tokens in (TokenMap.pack(maps), TokenMap.batch(maps, side="left")):
        axis = axis_of(tokens, window=Window2D((3, 3), (2, 1), (1, 2)))
        visibility = Visibility(axis, axis, RULES, CLASSES)
        q, k = torch.randn(len(tokens.role), 4, len(tokens), 16), torch.randn(len(tokens.role), 2, len(tokens), 16)
        learns = backend != "flex"
        inputs = [x.clone().requires_grad_(learns) for x in (q, k, k)]
        if backend == "rectangles":
            with pytest.raises(BackendError, match="a window over a grid cuts it"):
                attend(*inputs, visibility, backend=backend)
            continue
        truth = [x.clone().requires_grad_() for x in (q, k, k)]
        out, wanted = attend(*inputs, visibility, backend=backend), attend(*truth, visibility, backend="reference")
        torch.testing.assert_close(out, wanted.detach() if not learns else wanted, rtol=0, atol=1e-5)
        if learns:
            direction = torch.randn_like(out)
            mine, theirs = (torch.autograd.grad(o, i, direction) for o, i in ((out, inputs), (wanted, truth)))
            for gradient, right in zip(mine, theirs, strict=True):
                torch.testing.assert_close(gradient, right, rtol=0, atol=2e-5)


def test_mistakes_are_named() -> None:
    tokens = TokenMap.from_layout([("image", 4)])
    with pytest.raises(ValueError, match="a 2-D window needs TokenMap"):
        axis_of(tokens, window=Window2D((3, 3)))
    with pytest.raises(ValueError, match="a rule asks for WINDOW_2D, but the tokens have no window"):
        Visibility(axis_of(tokens), axis_of(tokens), RULES, CLASSES)
    with pytest.raises(ValueError, match=re.escape("the stride of a window is at most its size")):
        Window2D((3, 3), (4, 1))
    with pytest.raises(ValueError, match="at least 1"):
        Window2D((3, 0))
    placed = axis_of(on_grid((2, 2)), window=Window2D((3, 3)))
    with pytest.raises(ValueError, match="lacks bottom, left, right, top, x, y"):
        placed.followed_by(axis_of(tokens))
