"""`attend`: every backend against plain torch written out, forward and backward, on random ragged visibilities."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mmfuse.fusion import FUSIONS
from mmfuse.fusion.base import ANSWER, CLASSES, MEDIA, PROMPT, axis_of, base_visibility
from mmfuse.kernels import BACKENDS, BackendError, Call, Condition, Visibility, attend
from mmfuse.kernels.attention import attention_weights
from mmfuse.sequence import TokenMap
from mmfuse.testing import backends_here

kinds = st.sampled_from(["text", "image", "answer"])
layouts = st.lists(st.tuples(kinds, st.integers(1, 3)), min_size=1, max_size=4)
batches = st.lists(layouts, min_size=1, max_size=3)
BLIND_PAIRS = ((PROMPT, MEDIA), (PROMPT, PROMPT), (ANSWER, PROMPT), (ANSWER, ANSWER))
BLIND_MEDIA = dict.fromkeys(BLIND_PAIRS, (Condition.CAUSAL,))


def visibilities(runs: list, name: str, arrangement: str) -> Visibility:
    maps = [TokenMap.from_layout(layout) for layout in runs]
    tokens = TokenMap.pack(maps) if arrangement == "pack" else TokenMap.batch(maps, side=arrangement)
    if name == "blind media":
        return Visibility(axis_of(tokens), axis_of(tokens), BLIND_MEDIA, CLASSES)
    return FUSIONS[name]().visibility(tokens)


def draw(visibility: Visibility, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, queries, keys = visibility.shape
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, count, length, 6, dtype=dtype, requires_grad=True) for count, length in sizes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Row by row, over the visible keys alone; nothing is masked, so nothing can be masked wrongly."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = seen[b, i].nonzero().flatten()
                if len(keys) == 0:
                    rows.append(q[b, h, i] * 0)
                    continue
                weights = (k[b, h // group, keys] @ q[b, h, i] * scale).softmax(0)
                rows.append(weights @ v[b, h // group, keys])
    return torch.stack(rows).reshape(q.shape)


def refused(backend: str, visibility: Visibility, inputs: list[Tensor]) -> bool:
    """Whether the backend refuses; then it does so by name, and `attend` too."""
    call = Call.of(*inputs[:3], mass=None)
    reason = BACKENDS[backend].refusal(visibility, call)
    if reason is not None:
        with pytest.raises(BackendError, match=re.escape(f"attention backend {backend!r} refuses: {reason}")):
            attend(*inputs[:3], visibility, backend=backend)
    return reason is not None


#: The interpreter takes seconds for random shapes, of which each hypothesis example has another.
MANY = [pytest.param(backend, marks=[pytest.mark.slow] if backend == "triton" else []) for backend in backends_here()]


def learns(backend: str) -> bool:
    """FlexAttention has no backward pass on the CPU: what it computes is compared, and that it says so."""
    return backend != "flex"


LEARNING = [backend for backend in backends_here() if learns(backend)]


def gradients(out: Tensor, inputs: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("backend", MANY)
@settings(max_examples=40)
@given(
    runs=batches,
    name=st.sampled_from([*FUSIONS, "blind media"]),
    arrangement=st.sampled_from(["left", "right", "pack"]),
    kv_heads=st.sampled_from([4, 2, 1]),
    window=st.one_of(st.none(), st.integers(1, 5)),
    start=st.integers(0, 3),
    scale=st.sampled_from([None, 0.3, 1.7]),
    seed=st.integers(0, 1000),
)
def test_backend_equals_attention_by_hand(
    backend: str, runs: list, name: str, arrangement: str, kv_heads: int, window: int | None, start: int,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    whole = visibilities(runs, name, arrangement)
    start = min(start, whole.shape[1] - 1)
    visibility = whole.rows(start).view(window=window, keys=max(1, whole.shape[2] - start))
    inputs = draw(visibility, 4, kv_heads)
    expected = by_hand(*inputs, visibility.dense(), 6**-0.5 if scale is None else scale)
    if backend == "rectangles" and refused(backend, visibility, inputs):
        return
    with torch.set_grad_enabled(learns(backend)):
        out = attend(*inputs, visibility, scale=scale, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    if not learns(backend):
        assert refused(backend, visibility, inputs)
        return
    direction = torch.randn_like(out)
    pairs = zip(gradients(out, inputs, direction), gradients(expected, inputs, direction), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_keeps_the_dtype(backend: str, dtype: torch.dtype) -> None:
    visibility = visibilities([[("text", 3), ("image", 2), ("text", 2)], [("text", 2)]], "mma", "right")
    inputs = draw(visibility, 4, 2)
    out = attend(*(x.detach().to(dtype) for x in inputs), visibility, backend=backend)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), attend(*inputs, visibility, backend="reference"), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", LEARNING)
def test_rows_without_keys_give_zero_and_take_no_gradient(backend: str) -> None:
    visibility = visibilities([[("text", 1), ("image", 2), ("text", 2)], [("text", 3)]], "blind media", "left")
    dead = visibility.dead_rows()
    assert dead.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    q, k, v = draw(visibility, 4, 2, torch.float32)
    out = attend(q, k, v, visibility, backend=backend)
    rows = dead[:, None, :].expand(-1, 4, -1)
    assert torch.equal(out[rows], torch.zeros_like(out[rows]))
    to_q, to_k, to_v = gradients(out, [q, k, v], torch.randn_like(out))
    assert torch.equal(to_q[rows], torch.zeros_like(to_q[rows]))
    padding = torch.tensor([True, True, False, False, False])
    for gradient in (to_k, to_v):
        assert torch.isfinite(gradient).all()
        assert torch.equal(gradient[1][:, padding], torch.zeros_like(gradient[1][:, padding]))
        assert gradient[0].abs().amax(-1).min() > 0


@pytest.mark.parametrize("backend", backends_here())
def test_contents_of_padding_have_no_effect(backend: str) -> None:
    visibility = visibilities([[("text", 3), ("image", 2), ("text", 2)], [("text", 2)]], "mma", "left")
    q, k, v = (x.detach() for x in draw(visibility, 4, 2, torch.float32))
    clean = attend(q, k, v, visibility, backend=backend)
    for x in (q, k, v):
        x[1, :, :5] = 1e4
    assert torch.equal(attend(q, k, v, visibility, backend=backend), clean)


def test_auto_is_a_backend() -> None:
    visibility = visibilities([[("text", 3), ("image", 2)]], "mma", "right")
    inputs = draw(visibility, 2, 2)
    assert torch.equal(attend(*inputs, visibility), attend(*inputs, visibility, backend="sdpa"))


@settings(max_examples=20)
@given(runs=batches, arrangement=st.sampled_from(["left", "right", "pack"]), scale=st.sampled_from([None, 0.3]))
def test_weights_are_what_attention_sums_with(runs: list, arrangement: str, scale: float | None) -> None:
    visibility = visibilities(runs, "mma", arrangement)
    q, k, v = draw(visibility, 4, 2)
    weights = attention_weights(q, k, visibility, scale=scale)
    totals = weights.sum(-1)
    expected = (~visibility.dead_rows()).double().unsqueeze(1).expand_as(totals)
    torch.testing.assert_close(totals, expected)
    assert bool((weights[~visibility.dense().unsqueeze(1).expand_as(weights)] == 0).all())
    out = attend(q, k, v, visibility, scale=scale, backend="reference")
    torch.testing.assert_close(weights @ v.repeat_interleave(2, dim=1), out)


def test_causal_path_equals_torch() -> None:
    visibility = base_visibility(TokenMap.from_layout([("text", 7)]))
    q, k, v = draw(visibility, 2, 2, torch.float32)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(attend(q, k, v, visibility, backend="sdpa"), expected)


# Refusals


def refuse(message: str, kind: type[Exception], *inputs: Tensor, visibility: object = None, **options: object) -> None:
    if visibility is None:
        visibility = base_visibility(TokenMap.from_layout([("text", 3)]).repeat(2))
    with pytest.raises(kind, match=re.escape(message)):
        attend(*inputs, visibility, **options)  # type: ignore[arg-type]


def test_attend_refuses() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    refuse("unknown attention backend 'sdap': did you mean 'sdpa'?", ValueError, q, k, k, backend="sdap")
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    refuse("attend needs a Visibility, got Tensor: masks are data here", TypeError, q, k, k, visibility=mask)
    refuse("q, k and v must share a float dtype", TypeError, q, k.double(), k)
    refuse("q, k and v must share a float dtype", TypeError, q.long(), k.long(), k.long())
    refuse("expected q [B,H,Sq,D] and k, v [B,Hkv,Sk,D], got [4, 3, 8]", ValueError, q[0], k, k)
    refuse("[2, 2, 3, 8], [2, 2, 2, 8]", ValueError, q, k, k[:, :, :2])
    refuse("must share B and D, and H must be a multiple of Hkv", ValueError, q[:, :3], k, k)
    refuse("must share B and D", ValueError, q, k[:1], k[:1])
    refuse("must share B and D", ValueError, q, k[..., :4], k[..., :4])
    refuse(
        "visibility is (2, 3, 3) (B, Sq, Sk), but q and k ask for (2, 3, 2)", ValueError, q, k[:, :, :2], k[:, :, :2]
    )
    refuse("visibility is (2, 3, 3) (B, Sq, Sk), but q and k ask for (1, 3, 3)", ValueError, q[:1], k[:1], k[:1])


@pytest.mark.parametrize("backend", MANY)
@settings(max_examples=30)
@given(
    runs=batches,
    name=st.sampled_from([*FUSIONS, "blind media"]),
    arrangement=st.sampled_from(["left", "right", "pack"]),
    kv_heads=st.sampled_from([4, 2, 1]),
    seed=st.integers(0, 1000),
)
def test_mass_is_one_more_key_of_value_zero(
    backend: str, runs: list, name: str, arrangement: str, kv_heads: int, seed: int
) -> None:
    """A softmax over the scores and the mass, of which the mass's share is thrown away; gradients reach the mass."""
    torch.manual_seed(seed)
    visibility = visibilities(runs, name, arrangement)
    q, k, v = inputs = draw(visibility, 4, kv_heads)
    mass = torch.randn(q.shape[0], q.shape[2], dtype=torch.float64, requires_grad=True)
    seen = visibility.dense().unsqueeze(1)
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    weights = ((q @ keys.transpose(-1, -2)) * 0.7).exp() * seen
    expected = weights @ values / (weights.sum(-1, keepdim=True) + mass.exp()[:, None, :, None])
    if backend == "rectangles" and refused(backend, visibility, inputs):
        return
    with torch.set_grad_enabled(learns(backend)):
        out = attend(q, k, v, visibility, scale=0.7, mass=mass, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    if not learns(backend):
        return
    direction = torch.randn_like(out)
    for mine, theirs in zip(
        gradients(out, [*inputs, mass], direction), gradients(expected, [*inputs, mass], direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", backends_here())
def test_no_mass_at_all_is_minus_infinity(backend: str) -> None:
    visibility = base_visibility(TokenMap.from_layout([("text", 4)]))
    q, k, v = (x.detach() for x in draw(visibility, 2, 2))
    nothing = torch.full((1, 4), -torch.inf, dtype=torch.float64)
    out = attend(q, k, v, visibility, mass=nothing, backend=backend)
    torch.testing.assert_close(out, attend(q, k, v, visibility, backend=backend), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=re.escape("mass must be [B, Sq] = [1, 4], got [1, 3]")):
        attend(q, k, v, visibility, mass=nothing[:, :3], backend=backend)
