"""The `rectangles` backend: torch's fused attention on each rectangle of the mask, merged by log-sum-exp.

    out = Σ_r exp(lse_r − lse) · out_r        lse = log Σ_r exp(lse_r)

The backward pass hands the *merged* output and lse to the fused backward of every rectangle. With them it rebuilds
the weights `exp(s − lse)` of the whole softmax and the row sums `Σ dO · O` of the whole output, so gradients are exact;
differentiating through the merge instead would keep every part and compute more.

Shapes: `B` samples, `H` heads, `Hkv` key heads, `Sq` queries, `Sk` keys, `D` head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfuse.kernels.call import Call
from mmfuse.kernels.rectangles import Rectangle, rectangle_cover
from mmfuse.kernels.visibility import Visibility


def refusal(visibility: Visibility, call: Call) -> str | None:
    """Why rectangles cannot do this, or None."""
    if call.device != "cpu":
        return f"it runs on the CPU, not on {call.device}"
    problem = rectangle_cover(visibility).problem
    return None if problem is None else f"the mask is no set of rectangles: {problem}"


def rectangles(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None) -> Tensor:
    """Masked attention over the rectangles of the visibility; rows that see nothing give 0."""
    cover = rectangle_cover(visibility).rectangles
    out: Tensor = _Merged.apply(q, k, v, mass, cover, scale)
    return out


def _part(x_BHSD: Tensor, rectangle: Rectangle, side: int) -> Tensor:
    """The rows of one rectangle, a view: its queries (side 0) or its keys (side 1)."""
    start, stop = (rectangle.key, rectangle.key_stop) if side else (rectangle.query, rectangle.query_stop)
    return x_BHSD[rectangle.sample : rectangle.sample_stop, :, start:stop]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, cover: tuple[Rectangle, ...], scale: float
    ) -> Tensor:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        out, lse = _forward(q, k, v, cover, scale)
        if mass is not None:
            total = torch.logaddexp(lse, mass.to(lse.dtype).unsqueeze(1))
            # A row that sees nothing, and without a mass, has no weights at all.
            out *= torch.exp(lse - total).nan_to_num(0.0).unsqueeze(-1).to(out.dtype)
            lse = total
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mass, out, lse)
        ctx.cover, ctx.scale = cover, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mass, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward(_dense_rows(grad), q, k, v, out, lse, ctx.cover, ctx.scale)
        if mass is None or not ctx.needs_input_grad[3]:
            return dq, dk, dv, None, None, None
        weight = torch.exp(mass.to(lse.dtype).unsqueeze(1) - lse).nan_to_num(0.0)
        d_mass = -(weight * (grad * out).sum(-1)).sum(1).to(mass.dtype)
        return dq, dk, dv, d_mass, None, None


def _dense_rows(x: Tensor) -> Tensor:
    """The fused kernels read rows of adjacent numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, cover: tuple[Rectangle, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Sq, D]` and lse `[B, H, Sq]`, both in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, length, width = q.shape
    whole = next((part for part in cover if _part(q, part, 0).shape == q.shape), None)
    if whole is not None:
        # Its output is where the others are merged into: there is nothing to clear and to copy.
        out, lse = _attention(q, k, v, whole, scale)
        out, seen = out.to(wide), [length] * batch
    else:
        # Laid out as [B, Sq, H, D], like the fused kernels' own.
        out = q.new_zeros(batch, length, heads, width, dtype=wide).transpose(1, 2)
        lse = q.new_full((batch, length, heads), -torch.inf, dtype=wide).transpose(1, 2)
        seen = [0] * batch
    for part in cover:
        if part is whole:
            continue
        # Rectangles come from top to bottom, so rows below all earlier ones have nothing to merge with.
        fresh = all(part.query >= seen[b] for b in range(part.sample, part.sample_stop))
        for b in range(part.sample, part.sample_stop):
            seen[b] = max(seen[b], part.query_stop)
        new, new_lse = _attention(q, k, v, part, scale)
        here, here_lse = _part(out, part, 0), lse[part.sample : part.sample_stop, :, part.query : part.query_stop]
        if fresh:
            here.copy_(new)
            here_lse.copy_(new_lse)
        else:
            here.lerp_(new.to(wide), torch.sigmoid(new_lse - here_lse).unsqueeze(-1))
            here_lse.copy_(torch.logaddexp(here_lse, new_lse))
    return out, lse


def _attention(q: Tensor, k: Tensor, v: Tensor, part: Rectangle, scale: float) -> tuple[Tensor, Tensor]:
    """Output and lse of one rectangle alone."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _part(q, part, 0), _part(k, part, 1), _part(v, part, 1), 0.0, part.causal, scale=scale
    )
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cover: tuple[Rectangle, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype; sums are kept in at least float32."""
    sums: list[Tensor | None] = [None, None, None]
    # The largest first: where it is the whole of a side, the others are added to what it gives.
    for part in sorted(cover, key=lambda part: part.pairs, reverse=True):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _part(grad, part, 0),
            _part(q, part, 0),
            _part(k, part, 1),
            _part(v, part, 1),
            _part(out, part, 0),
            lse[part.sample : part.sample_stop, :, part.query : part.query_stop],
            0.0,
            part.causal,
            scale=scale,
        )
        sums = [
            _added(total, new, x, part, side)
            for total, new, x, side in zip(sums, parts, (q, k, v), (0, 1, 1), strict=True)
        ]
    dq, dk, dv = (
        torch.zeros_like(x) if total is None else total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _added(total: Tensor | None, new: Tensor, x: Tensor, part: Rectangle, side: int) -> Tensor:
    """The sum of gradients of `x`, with those of one part of it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if total is None and new.shape == x.shape:
        return new.to(wide)
    total = torch.zeros_like(x, dtype=wide) if total is None else total
    _part(total, part, side).add_(new)
    return total
