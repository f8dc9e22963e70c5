"""The kernels as torch operators, which autograd and torch.compile know.

Shapes: queries `[B, H, Sq, D]`, keys and values `[B, Hkv, Sk, D]`, log-sum-exp `[B, H, Sq]`. Inside the operators the
mass and the log-sum-exp are in units of log2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from mmfuse.kernels.plan import BlockPlan
from mmfuse.kernels.triton.launch import DECODE_ROWS
from mmfuse.kernels.triton.run import (
    LN2,
    Backward,
    arguments_of,
    launch_for,
    like_columns,
    like_output,
    rows_without_gaps,
    run_decode,
    run_delta,
    run_dkv,
    run_dq,
    run_forward,
    run_statistics,
    sums,
)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    mass: Tensor | None = None,
    bias: Tensor | None = None,
    classes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention along the lists of a plan, differentiable in `q`, `k`, `v`, `mass` and `bias`.

    Args:
        q: `[B, H, Sq, D]` in float16, bfloat16 or float32; float64 in the interpreter.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, D]`.
        plan: of the same `B`, `Sq` and `Sk`, on the same device; its blocks are multiples of 64.
        scale: of the scores.
        mass: `[B, Sq]`, the logarithm of what is added to each row's denominator.
        bias: `[B, H, Sq, 8]`, what each query adds to its scores with keys of each class; only with `classes`.
        classes: `[B, Sk]`, of the keys; given where there is a bias or shares are wanted.

    Returns:
        The output `[B, H, Sq, D]`, and the log-sum-exp `[B, H, Sq]` of the scores (and mass) in float32, or float64 for
        float64 inputs; rows that see nothing have 0 and -inf. Last the shares `[B, H, Sq, 8]` of the classes in the
        dtype of the log-sum-exp; empty without `classes`.

    Raises:
        ValueError: the plan is of another shape, or its blocks are no multiples of 64.
    """
    blocks = _blocks(q, k, plan)
    by_query, by_key = arguments_of(plan.by_query, plan.words), arguments_of(plan.by_key, plan.words_t)
    mass_log2 = None if mass is None else mass.to(sums(q)) / LN2
    if classes is None and bias is not None:
        raise ValueError("a bias is by class: it needs the classes of the keys")
    bias_log2 = None if bias is None else (bias.to(sums(q)) / LN2).contiguous()
    classes = None if classes is None else classes.to(torch.int32).contiguous()
    inputs = (q, k, v, mass_log2)
    few = q.shape[2] * (q.shape[1] // k.shape[1]) <= DECODE_ROWS
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if few and not wanted and classes is None:
        out, lse = attention_decode(*inputs, by_query, *blocks, scale)
        return out, lse * LN2, lse.new_empty(0)
    out, lse, shares = attention_forward(*inputs, bias_log2, classes, by_query, by_key, *blocks, scale)
    return out, lse * LN2, shares


@torch.no_grad()
def masked_statistics(
    q: Tensor,
    k: Tensor,
    plan: BlockPlan,
    classes: Tensor,
    *,
    scale: float,
    mass: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of the classes, entropy and largest score of each row; the arguments are those of `masked_attention`.

    Returns:
        `[B, H, Sq, 8]`, the weights by class of the key; `[B, H, Sq]`, -Σ p log p over the keys, in nats; and
        `[B, H, Sq]`, the largest score with its bias, -inf where a row sees nothing. In float32, or float64.
    """
    blocks, lists = _blocks(q, k, plan), arguments_of(plan.by_query, plan.words)
    mass = None if mass is None else mass.to(sums(q)) / LN2
    bias = None if bias is None else (bias.to(sums(q)) / LN2).contiguous()
    classes = classes.to(torch.int32).contiguous()
    launch = launch_for("statistics+", q)
    shares, entropy, peak = run_statistics(q, k, mass, bias, classes, lists, blocks, scale, launch)
    return shares, entropy * LN2, peak * LN2


def _blocks(q: Tensor, k: Tensor, plan: BlockPlan) -> tuple[int, int]:
    """The sides of the plan's blocks, if it fits."""
    asked, planned = (q.shape[0], q.shape[2], k.shape[2]), (plan.batch, plan.queries, plan.keys)
    if asked != planned:
        raise ValueError(f"the plan is for (B, Sq, Sk) = {planned}, but q and k ask for {asked}")
    blocks = (plan.block_q, plan.block_k)
    if any(side % 64 for side in blocks):
        raise ValueError(f"bit tiles come in words of 64: blocks must be multiples of 64, got {blocks}")
    return blocks


@library.custom_op("mmfuse::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp, shares); `by_key` is for the backward."""
    launch = launch_for("forward" if classes is None else "forward+", q)
    return run_forward(q, k, v, mass, bias, classes, by_query, (block_q, block_k), scale, launch)


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse = like_output(q)
    return out, lse, like_columns(lse, classes)


@library.custom_op("mmfuse::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, classes: Tensor | None,
    out: Tensor, lse: Tensor, shares: Tensor, d_out: Tensor, d_lse: Tensor | None, d_shares: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradients of q, k and v, delta `[B, H, Sq]`, gradient of the bias); `d_lse` is of the natural log-sum-exp."""
    q, k, v, d_out = (rows_without_gaps(x) for x in (q, k, v, d_out))
    delta = run_delta(out, d_out, d_lse, shares, d_shares, launch_for("delta", q))
    saved = Backward(q, k, v, bias, classes, d_out, d_shares, lse, delta, (block_q, block_k), scale)
    plus = "" if classes is None else "+"
    dq, d_bias = run_dq(saved, by_query, launch_for("dq" + plus, q))
    dk, dv = run_dkv(saved, by_key, launch_for("dkv" + plus, q))
    return dq, dk, dv, delta, d_bias


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, classes: Tensor | None,
    out: Tensor, lse: Tensor, shares: Tensor, d_out: Tensor, d_lse: Tensor | None, d_shares: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    delta = torch.empty(q.shape[:3], dtype=sums(q), device=q.device)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), delta, like_columns(delta, bias)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mass, bias, classes, by_query, by_key, *ctx.numbers = inputs
    ctx.sides = len(by_query)
    ctx.save_for_backward(q, k, v, mass, bias, classes, *output, *by_query, *by_key)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, d_shares: Tensor | None) -> tuple[Any, ...]:
    q, k, v, mass, bias, classes, out, lse, shares, *lists = ctx.saved_tensors
    by_query, by_key = lists[: ctx.sides], lists[ctx.sides :]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_lse = None if d_lse is None else (d_lse / LN2).contiguous()
    d_shares = None if d_shares is None or classes is None else d_shares.contiguous()
    outputs = (out, lse, shares, d_out, d_lse, d_shares)
    dq, dk, dv, delta, d_bias = attention_backward(q, k, v, bias, classes, *outputs, by_query, by_key, *ctx.numbers)
    d_mass = None
    if mass is not None and ctx.needs_input_grad[3]:
        # The mass has a weight as every key has, and its value is 0; where nothing is seen, lse is -inf too.
        share = torch.where(mass == -torch.inf, 0.0, (mass.unsqueeze(1) - lse).transpose(0, 1).exp2())
        d_mass = -LN2 * (share * delta.transpose(0, 1)).sum(0)
    d_bias = None if bias is None else d_bias * LN2
    lists = ([None] * len(by_query), [None] * len(by_key))
    return dq, dk, dv, d_mass, d_bias, None, *lists, None, None, None


library.register_autograd("mmfuse::attention_forward", _differentiate, setup_context=_remember)


@library.custom_op("mmfuse::attention_decode", mutates_args=())
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, by_query: Sequence[Tensor],
    block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp) of few queries; no gradient."""
    return run_decode(q, k, v, mass, by_query, (block_q, block_k), scale, launch_for("decode", q))


@attention_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, by_query: Sequence[Tensor],
    block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return like_output(q)
