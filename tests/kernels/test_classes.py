"""Bias by class, the shares of the classes, and the statistics of rows, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.kernels import (
    BackendError,
    Call,
    Visibility,
    attend,
    attend_with_shares,
    attention_statistics,
)
from mmfuse.sequence import TokenMap
from mmfuse.testing import backends_here

LAYOUTS = [[("text", 3), ("image", 6), ("text", 4), ("answer", 5)], [("image", 4), ("text", 5)]]
SCALE = 0.3


def visibility_of(fusion: str = "naavit") -> Visibility:
    """Two samples, the second padded on the left; under NAAViT media see nothing at all."""
    maps = [TokenMap.from_layout(layout) for layout in LAYOUTS]
    return FUSIONS[fusion]().visibility(TokenMap.batch(maps, side="left"))


def draw(visibility: Visibility, *, grad: bool = True, width: int = 16) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v of 4 heads on 2 key heads, a mass, and a bias."""
    batch, queries, keys = visibility.shape
    count = len(visibility.names)
    sizes = ((batch, 4, queries, width), (batch, 2, keys, width), (batch, 2, keys, width), (batch, queries))
    *qkv, mass, bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=grad) for size in (*sizes, (4, count, count))
    )
    return qkv, mass, bias


def rows_by_hand(
    qkv: list[Tensor], mass: Tensor | None, bias: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, shares, entropy, largest score), row by row over the visible keys alone."""
    q, k, v = qkv
    seen, classes = visibility.dense(), (visibility.queries.cls, visibility.keys.cls)
    outs, shares, entropies, peaks = [], [], [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = seen[b, i].nonzero().flatten()
                scores = k[b, h // 2, keys] @ q[b, h, i] * SCALE + bias[h, classes[0][b, i], classes[1][b, keys]]
                total = scores if mass is None else torch.cat([scores, mass[b, i, None]])
                weights = (scores - total.logsumexp(0)).exp() if len(total) else scores
                outs.append(weights @ v[b, h // 2, keys])
                members = [classes[1][b, keys] == c for c in range(len(visibility.names))]
                shares.append(torch.stack([weights[member].sum() for member in members]))
                entropies.append(-(weights * weights.log()).sum())
                peaks.append(scores.max() if len(keys) else torch.tensor(-math.inf, dtype=q.dtype))
    size = q.shape[:3]
    found = [torch.stack(x).unflatten(0, size) for x in (outs, shares, entropies, peaks)]
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("fusion", ["mma", "naavit"])
@pytest.mark.parametrize("backend", backends_here())
def test_bias_and_shares_are_what_they_are_by_hand(backend: str, fusion: str, with_mass: bool) -> None:
    visibility = visibility_of(fusion)
    # FlexAttention has no backward pass on the CPU.
    qkv, mass, bias = draw(visibility, grad=backend != "flex")
    some = mass if with_mass else None
    mine = attend_with_shares(*qkv, visibility, scale=SCALE, mass=some, bias=bias, backend=backend)
    theirs = rows_by_hand(qkv, some, bias, visibility)[:2]
    inputs = [*qkv, bias, *([mass] if with_mass else [])]
    directions = [torch.randn_like(x) for x in theirs]
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-11)
    alone = attend(*qkv, visibility, scale=SCALE, mass=some, bias=bias, backend=backend)
    torch.testing.assert_close(alone, mine[0], rtol=0, atol=1e-12)
    if backend == "flex":
        return
    for x, y in zip(*(torch.autograd.grad(results, inputs, directions) for results in (mine, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("width", [16, 80])
def test_the_kernels_bias_and_shares_hold_over_whole_blocks(width: int) -> None:
    """Two documents of several blocks, whole and in part: output, shares and gradients are the reference's."""
    runs = [[("text", 90), ("image", 100), ("answer", 10)], [("image", 130), ("text", 20)]]
    tokens = TokenMap.batch([TokenMap.from_layout(layout) for layout in runs], side="right")
    visibility = FUSIONS["mma"]().visibility(tokens)
    qkv, mass, bias = draw(visibility, width=width)
    inputs, results = [*qkv, mass, bias], []
    for backend in ("triton", "reference"):
        outputs = attend_with_shares(*qkv, visibility, scale=SCALE, mass=mass, bias=bias, backend=backend)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, directions)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", backends_here())
def test_shares_sum_to_one_where_a_row_sees_anything(backend: str) -> None:
    visibility = visibility_of()
    qkv, _, _ = draw(visibility, grad=False)
    out, shares = attend_with_shares(*qkv, visibility, backend=backend)
    live = (~visibility.dead_rows()).double()[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(shares.sum(-1), live, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(out, attend(*qkv, visibility, backend=backend), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [backend for backend in backends_here() if backend != "reference"])
def test_a_bias_is_not_rounded_to_16_bits(backend: str, dtype: torch.dtype) -> None:
    """Classes whose biases differ by less than bfloat16 can say at their size get shares that differ so: by 0.013.

    The reference is left out: it keeps even scores in the dtype of its inputs.
    """
    visibility = visibility_of("causal")
    qkv = [torch.zeros_like(x).to(dtype) for x in draw(visibility, grad=False)[0]]
    count = len(visibility.names)
    bias = torch.full((4, count, count), 40.0)
    bias[:, :, 1] += 0.05
    _, mine = attend_with_shares(*qkv, visibility, bias=bias, backend=backend)
    _, truth = attend_with_shares(*(x.double() for x in qkv), visibility, bias=bias.double(), backend="reference")
    torch.testing.assert_close(mine.double(), truth, rtol=0, atol=6e-3)


@pytest.mark.parametrize("with_mass", [False, True])
def test_statistics_are_what_they_are_by_hand(with_mass: bool) -> None:
    visibility = visibility_of()
    qkv, mass, bias = draw(visibility, grad=False)
    some = mass if with_mass else None
    _, shares, entropy, peak = rows_by_hand(qkv, some, bias, visibility)
    for backend in ("auto", "reference", "triton"):
        mine = attention_statistics(*qkv[:2], visibility, scale=SCALE, mass=some, bias=bias, backend=backend)
        for x, y in zip((mine.shares, mine.entropy, mine.max_logit), (shares, entropy, peak), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_statistics_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = visibility_of()
    qkv, mass, bias = draw(visibility)
    whole = attention_statistics(*qkv[:2], visibility, mass=mass, bias=bias)
    monkeypatch.setattr("mmfuse.kernels.reference.ROWS", 7)
    parts = attention_statistics(*qkv[:2], visibility, mass=mass, bias=bias)
    assert not whole.shares.requires_grad
    for x, y in zip(vars(whole).values(), vars(parts).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sharpness", [1.0, 300.0])
def test_the_kernels_statistics_hold_over_whole_blocks(sharpness: float) -> None:
    """Full and partial blocks, scores in the hundreds, and a mass that outweighs them or is nothing."""
    runs = [[("text", 90), ("image", 100), ("answer", 10)], [("image", 130), ("text", 20)]]
    visibility = FUSIONS["mma"]().visibility(TokenMap.batch([TokenMap.from_layout(layout) for layout in runs]))
    qkv, mass, bias = draw(visibility, grad=False, width=80)
    q, k, _ = qkv
    mass[:, ::3], mass[:, 1::3] = -torch.inf, 3 * sharpness
    for some, add in ((None, None), (mass, bias), (None, bias)):
        found = [
            attention_statistics(q * sharpness, k, visibility, scale=SCALE, mass=some, bias=add, backend=backend)
            for backend in ("triton", "reference")
        ]
        for x, y in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_an_even_row_has_the_entropy_of_its_keys() -> None:
    visibility = visibility_of("causal")
    q, k, _ = (torch.zeros_like(x) for x in draw(visibility, grad=False)[0])
    found = attention_statistics(q, k, visibility)
    keys = visibility.dense().sum(-1).clamp(min=1).log().double()[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(found.entropy, keys)


def test_what_cannot_be_is_refused() -> None:
    visibility = visibility_of()
    qkv, _, bias = draw(visibility)
    with pytest.raises(ValueError, match=r"bias must be \[H, C, C\] = \[4, 3, 3\], got \[3, 3, 3\]"):
        attend(*qkv, visibility, bias=bias[:3])
    with pytest.raises(BackendError, match=r"'sdpa' keeps no statistics\. Backends that do: reference, triton"):
        attention_statistics(*qkv[:2], visibility, backend="sdpa")
    with pytest.raises(BackendError, match="'flex' refuses: FlexAttention has no backward pass on the CPU"):
        attend(*(x.detach() for x in qkv), visibility, bias=bias, backend="flex")
    assert Call.of(*(x.detach() for x in qkv), mass=None, bias=bias).differentiable
