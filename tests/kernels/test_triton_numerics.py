"""The Triton kernels in the dtypes of training, bit for bit from run to run, and as operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, library

from mmfuse.fusion.base import base_visibility
from mmfuse.kernels.plan import BlockPlan, plan_blocks
from mmfuse.kernels.reference import reference
from mmfuse.kernels.triton.operator import arguments_of, attention_forward, masked_attention
from mmfuse.kernels.triton.primitives import dot, dot_onto
from mmfuse.sequence import TokenMap

pytestmark = pytest.mark.usefixtures("poisoned")

HALVES = (torch.float16, torch.bfloat16)
#: Head dims, and how much larger than the keys the queries are.
SIZES = ((64, 1.0), (80, 30.0), (96, 1.0), (128, 1.0), (256, 1.0))


class Mask:
    """What the reference asks of a visibility, for a mask that no rule describes."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen

    def dense(self) -> Tensor:
        return self.seen


def random_mask(batch: int, queries: int, keys: int) -> Tensor:
    """Half of the pairs at random, all of the first 64 keys, and a row that sees nothing."""
    seen = torch.rand(batch, queries, keys) < 0.5
    seen[..., :64] = True
    seen[:, queries // 2] = False
    return seen


def draw(dtype: torch.dtype, head_dim: int = 64, *, queries: int = 130, heads: int = 4) -> list[Tensor]:
    shapes = ((1, heads, queries, head_dim), (1, 2, 130, head_dim), (1, 2, 130, head_dim))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def run(inputs: list[Tensor], seen: Tensor, by_force: Callable[..., Any], scale: float = 0.125) -> list[Tensor]:
    """Output and gradients."""
    out, _, _ = masked_attention(*inputs, by_force(seen), scale=scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction_of(out))]


def direction_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def plain(inputs: list[Tensor], seen: Tensor, dtype: torch.dtype, scale: float = 0.125) -> list[Tensor]:
    """The reference in `dtype`: output and gradients."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = reference(*leaves, Mask(seen), scale, None)  # type: ignore[arg-type]
    direction = direction_of(out).to(inputs[0].dtype).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


# Rounding


@pytest.mark.parametrize(
    ("dtype", "head_dim", "size"),
    [(torch.float32, 64, 1.0), *((dtype, *case) for dtype in HALVES for case in SIZES)],
    ids=str,
)
def test_errors_are_at_most_twice_those_of_plain_torch(
    dtype: torch.dtype, head_dim: int, size: float, by_force: Callable[..., Any]
) -> None:
    """Sharp softmaxes too: there every implementation loses digits, and a fixed tolerance would say nothing.

    Not so in float32: weights that the backward computes again carry the rounding of the log-sum-exp, which plain
    torch, having kept them, does not know. 16-bit numbers are too coarse for that to show.
    """
    seen = random_mask(1, 130, 130)
    q, k, v = draw(dtype, head_dim)
    inputs = [(q.detach() * size).requires_grad_(), k, v]
    truth = plain(inputs, seen, torch.float64)
    errors = [
        [float((x.double() - y).norm()) for x, y in zip(results, truth, strict=True)]
        for results in (run(inputs, seen, by_force), plain(inputs, seen, dtype))
    ]
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 2 * theirs + 1e-12


@triton.jit
def products(A, B, OUT, OURS: tl.constexpr):
    """`OUT = A @ B` and once more on top, with our product or with triton's."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(A + i * 16 + j), tl.load(B + i * 16 + j)
    c = dot_onto(a, b, dot(a, b, tl.float32, "ieee"), "ieee") if OURS else tl.dot(a, b, tl.dot(a, b))
    tl.store(OUT + i * 16 + j, c)


def test_the_interpreter_is_kept_from_multiplying_bf16_as_integers() -> None:
    """If the second half fails, triton has learnt it and `primitives.dot` need not widen its operands any more."""
    a, b = torch.randn(2, 16, 16).bfloat16()
    expected = 2 * (a.float() @ b.float())
    ours, theirs = torch.empty(2, 16, 16)
    products[(1,)](a, b, ours, OURS=True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    products[(1,)](a, b, theirs, OURS=False)
    assert float((theirs - expected).abs().max()) > 1e6


# The same bits


def test_two_runs_and_any_order_of_work_give_the_same_bits(by_force: Callable[..., Any]) -> None:
    seen, inputs = random_mask(1, 130, 130), draw(torch.bfloat16)
    first = run(inputs, seen, by_force)

    def shuffled(seen: Tensor) -> BlockPlan:
        plan = by_force(seen)
        sides = (replace(side, order=side.order.flip(0)) for side in (plan.by_query, plan.by_key))
        return replace(plan, **dict(zip(("by_query", "by_key"), sides, strict=True)))

    for again in (run(inputs, seen, by_force), run(inputs, seen, shuffled)):
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_shared_bit_tiles_change_nothing(by_force: Callable[..., Any]) -> None:
    visibility = base_visibility(TokenMap.from_layout([("text", 200)]))
    inputs = [torch.randn(1, 2, 200, 64).requires_grad_() for _ in range(3)]
    plan = plan_blocks(visibility)
    assert len(plan.words) < plan.partial
    shared = run(inputs, visibility.dense(), lambda seen: plan)
    assert all(torch.equal(x, y) for x, y in zip(shared, run(inputs, visibility.dense(), by_force), strict=True))


# Edges


def test_a_mask_of_nothing_gives_zeros(by_force: Callable[..., Any]) -> None:
    results = run(draw(torch.float32), torch.zeros(1, 130, 130, dtype=torch.bool), by_force)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


def test_all_weight_on_the_mass_gives_zeros(by_force: Callable[..., Any]) -> None:
    q, k, v = draw(torch.float64)
    plan = by_force(random_mask(1, 130, 130))
    mass = torch.full((1, 130), 1e4, dtype=torch.float64, requires_grad=True)
    out, lse, _ = masked_attention(q, k, v, plan, scale=0.1, mass=mass)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4))
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), [q, k, v, mass]))


def test_plans_that_do_not_fit_are_refused(by_force: Callable[..., Any]) -> None:
    plan, inputs = by_force(random_mask(1, 130, 130)), draw(torch.float32)
    with pytest.raises(ValueError, match=r"blocks must be multiples of 64, got \(32, 64\)"):
        masked_attention(*inputs, replace(plan, block_q=32), scale=1.0)
    with pytest.raises(ValueError, match=r"is for \(B, Sq, Sk\) = \(1, 130, 130\), but q and k ask for \(1, 60, 130\)"):
        masked_attention(inputs[0][:, :, :60], *inputs[1:], plan, scale=1.0)


# As operators of torch


def test_torch_finds_no_fault_with_the_operator(by_force: Callable[..., Any]) -> None:
    seen = random_mask(1, 17, 17)
    inputs = [torch.randn(1, 2, 17, 16, requires_grad=True) for _ in range(3)]
    mass = torch.randn(1, 17, requires_grad=True)
    bias, classes = torch.randn(1, 2, 17, 8, requires_grad=True), torch.randint(0, 3, (1, 17), dtype=torch.int32)
    plan = by_force(seen)
    sides = (arguments_of(plan.by_query, plan.words), arguments_of(plan.by_key, plan.words_t))
    library.opcheck(attention_forward, (*inputs, mass, bias, classes, *sides, 64, 64, 0.3))


def test_compiled_code_holds_the_operator_in_one_graph(by_force: Callable[..., Any]) -> None:
    seen, inputs = random_mask(1, 130, 130), draw(torch.float32)
    plan = by_force(seen)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, plan, scale=0.125)[0] * 1.0

    out = torch.compile(attention, backend="aot_eager", fullgraph=True)(*inputs)
    results = [out.detach(), *torch.autograd.grad(out, inputs, direction_of(out))]
    assert all(torch.equal(x, y) for x, y in zip(results, run(inputs, seen, by_force), strict=True))
