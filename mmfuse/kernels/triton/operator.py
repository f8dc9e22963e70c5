"""The kernels as torch operators, which autograd and torch.compile know.

Shapes: queries `[B, H, Sq, D]`, keys and values `[B, Hkv, Sk, D]`, log-sum-exp `[B, H, Sq]`. Inside the operators the
mass and the log-sum-exp are in units of log2, which is what the kernels' exp2 asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mmfuse.kernels.plan import BlockPlan, TileLists
from mmfuse.kernels.triton.backward import delta_kernel, dkv_kernel, dq_kernel
from mmfuse.kernels.triton.decode import decode_kernel, merge_kernel
from mmfuse.kernels.triton.forward import forward_kernel
from mmfuse.kernels.triton.launch import Launch, decode_splits, launch_of, padded
from mmfuse.kernels.visibility import MAX_CLASSES

LN2 = math.log(2.0)


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
    asked, planned = (q.shape[0], q.shape[2], k.shape[2]), (plan.batch, plan.queries, plan.keys)
    if asked != planned:
        raise ValueError(f"the plan is for (B, Sq, Sk) = {planned}, but q and k ask for {asked}")
    blocks = (plan.block_q, plan.block_k)
    if any(side % 64 for side in blocks):
        raise ValueError(f"bit tiles come in words of 64: blocks must be multiples of 64, got {blocks}")
    by_query, by_key = arguments_of(plan.by_query, plan.words), arguments_of(plan.by_key, plan.words_t)
    mass_log2 = None if mass is None else mass.to(_sums(q)) / LN2
    if classes is None and bias is not None:
        raise ValueError("a bias is by class: it needs the classes of the keys")
    bias_log2 = None if bias is None else (bias.to(_sums(q)) / LN2).contiguous()
    classes = None if classes is None else classes.to(torch.int32).contiguous()
    inputs = (q, k, v, mass_log2)
    few = q.shape[2] * (q.shape[1] // k.shape[1]) <= _launch("decode", q).rows
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if few and not wanted and classes is None:
        out, lse = attention_decode(*inputs, by_query, *blocks, scale)
        return out, lse * LN2, lse.new_empty(0)
    out, lse, shares = attention_forward(*inputs, bias_log2, classes, by_query, by_key, *blocks, scale)
    return out, lse * LN2, shares


def arguments_of(lists: TileLists, words: Tensor) -> list[Tensor]:
    """One orientation of a plan in the order of the kernels' parameters."""
    full, partial = (lists.full_offsets, lists.full_blocks), (lists.partial_offsets, lists.partial_blocks)
    return [lists.order, *full, *partial, lists.partial_tiles, words]


@torch.library.custom_op("mmfuse::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp, shares); `by_key` is for the backward."""
    q, k, v = (_rows_without_gaps(x) for x in (q, k, v))
    batch, heads, queries, head_dim = q.shape
    out, lse = _like_output(q)
    shares = _like_columns(lse, classes)
    launch = _launch("forward", q)
    grid = (len(by_query[0]) * (block_q // launch.rows), heads)
    forward_kernel[grid](
        q, k, v, mass, bias, classes, out, lse, shares, *by_query,
        scale / LN2, queries, k.shape[2], len(by_query[0]) // batch,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        GROUP=heads // k.shape[1], D=head_dim, W=padded(head_dim), BLOCK_Q=block_q, BLOCK_K=block_k,
        R=launch.rows, C=launch.columns, ACC=_accumulator(q), PRECISION=_precision(q),
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out, lse, shares


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse = _like_output(q)
    return out, lse, _like_columns(lse, classes)


@torch.library.custom_op("mmfuse::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, classes: Tensor | None,
    out: Tensor, lse: Tensor, shares: Tensor, d_out: Tensor, d_lse: Tensor | None, d_shares: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradients of q, k and v, delta `[B, H, Sq]`, gradient of the bias); `d_lse` is of the natural log-sum-exp."""
    q, k, v, d_out = (_rows_without_gaps(x) for x in (q, k, v, d_out))
    batch, heads, queries, head_dim = q.shape
    key_heads, keys = k.shape[1:3]
    dq, dk, dv, delta = _like_gradients(q, k)
    d_bias = _like_columns(delta, bias)
    shape: dict[str, Any] = {"D": head_dim, "W": padded(head_dim), "ACC": _accumulator(q)}
    launch = _launch("delta", q)
    delta_kernel[(-(-queries // launch.rows), heads, batch)](
        out,
        d_out,
        d_lse,
        shares,
        d_shares,
        delta,
        queries,
        *d_out.stride()[:3],
        R=launch.rows,
        num_warps=launch.warps,
        **shape,
    )
    shape |= {"GROUP": heads // key_heads, "BLOCK_Q": block_q, "BLOCK_K": block_k, "PRECISION": _precision(q)}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    scales = (scale / LN2, scale, queries, keys)
    launch = _launch("dq", q)
    dq_kernel[(len(by_query[0]) * (block_q // launch.rows), heads)](
        q, k, v, d_out, bias, classes, d_shares, lse, delta, dq, d_bias, *by_query,
        *scales, len(by_query[0]) // batch, *strides,
        R=launch.rows, C=launch.columns, num_warps=launch.warps, num_stages=launch.stages, **shape,
    )  # fmt: skip
    launch = _launch("dkv", q)
    dkv_kernel[(len(by_key[0]) * (block_k // launch.rows), key_heads)](
        q, k, v, d_out, bias, classes, d_shares, lse, delta, dk, dv, *by_key,
        *scales, len(by_key[0]) // batch, *strides,
        R=launch.rows, C=launch.columns, num_warps=launch.warps, num_stages=launch.stages, **shape,
    )  # fmt: skip
    return dq, dk, dv, delta, d_bias


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, classes: Tensor | None,
    out: Tensor, lse: Tensor, shares: Tensor, d_out: Tensor, d_lse: Tensor | None, d_shares: Tensor | None,
    by_query: Sequence[Tensor], by_key: Sequence[Tensor], block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _like_gradients(q, k)
    return *gradients, _like_columns(gradients[3], bias)


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


torch.library.register_autograd("mmfuse::attention_forward", _differentiate, setup_context=_remember)


@torch.library.custom_op("mmfuse::attention_decode", mutates_args=())
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, by_query: Sequence[Tensor],
    block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp) of few queries; no gradient."""
    q, k, v = (_rows_without_gaps(x) for x in (q, k, v))
    batch, heads, queries, head_dim = q.shape
    key_heads, keys = k.shape[1:3]
    out, lse = _like_output(q)
    launch, rows = _launch("decode", q), padded(queries * heads // key_heads)
    splits = decode_splits(batch * key_heads, keys, block_k)
    part = torch.empty(batch, key_heads, splits, rows, head_dim, dtype=lse.dtype, device=q.device)
    part_lse = torch.empty(part.shape[:-1], dtype=lse.dtype, device=q.device)
    shape: dict[str, Any] = {"GROUP": heads // key_heads, "D": head_dim, "W": padded(head_dim)}
    shape |= {"SPLITS": splits, "R": rows}
    decode_kernel[(batch, key_heads, splits)](
        q, k, v, part, part_lse, *by_query[1:], scale / LN2, queries, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        BLOCK_Q=block_q, BLOCK_K=block_k, C=launch.columns, ACC=_accumulator(q), PRECISION=_precision(q),
        num_warps=launch.warps, **shape,
    )  # fmt: skip
    merge_kernel[(queries, heads, batch)](part, part_lse, mass, out, lse, queries, **shape)
    return out, lse


@attention_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, by_query: Sequence[Tensor],
    block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like_output(q)


def _launch(kernel: str, q: Tensor) -> Launch:
    return launch_of(kernel, q.shape[3], q.itemsize, amd=torch.version.hip is not None)


def _like_output(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), torch.empty(q.shape[:3], dtype=_sums(q), device=q.device)


def _like_columns(lse: Tensor, wanted: Tensor | None) -> Tensor:
    """`[B, H, Sq, 8]` like the log-sum-exp; empty if nothing is wanted."""
    return lse.new_empty((*lse.shape, MAX_CLASSES) if wanted is not None else 0)


def _like_gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta = torch.empty(q.shape[:3], dtype=_sums(q), device=q.device)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), delta


def _rows_without_gaps(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _sums(q: Tensor) -> torch.dtype:
    """What sums over keys are kept in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _accumulator(q: Tensor) -> tl.dtype:
    return tl.float64 if q.dtype == torch.float64 else tl.float32


def _precision(q: Tensor) -> str:
    """How products of float32 are rounded: as torch was told to do it everywhere."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
