"""The kernels as functions over tensors: sizes, strides and launches, and no autograd.

Shapes: queries `[B, H, Sq, D]`, keys and values `[B, Hkv, Sk, D]`, log-sum-exp `[B, H, Sq]`. Mass, bias and log-sum-exp
are in units of log2, which is what the kernels' exp2 asks for. `lists` is one orientation of a plan in the order of the
kernels' parameters; `blocks` are the sides of its tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mmfuse.kernels.plan import TileLists
from mmfuse.kernels.triton.backward import delta_kernel, dkv_kernel, dq_kernel
from mmfuse.kernels.triton.decode import decode_kernel, merge_kernel
from mmfuse.kernels.triton.forward import forward_kernel
from mmfuse.kernels.triton.launch import Launch, decode_splits, launch_of, padded
from mmfuse.kernels.triton.statistics import statistics_kernel
from mmfuse.kernels.triton.tuning import tuned_launch
from mmfuse.kernels.visibility import MAX_CLASSES

LN2 = math.log(2.0)


def arguments_of(lists: TileLists, words: Tensor) -> list[Tensor]:
    """One orientation of a plan in the order of the kernels' parameters."""
    full, partial = (lists.full_offsets, lists.full_blocks), (lists.partial_offsets, lists.partial_blocks)
    return [lists.order, *full, *partial, lists.partial_tiles, words]


def launch_for(kernel: str, q: Tensor) -> Launch:
    """The launch that was measured on this GPU, if any, or else the table's."""
    tuned = tuned_launch(kernel, q.shape[3], q.itemsize, torch.cuda.get_device_name(q.device)) if q.is_cuda else None
    return tuned or launch_of(kernel, q.shape[3], q.itemsize, amd=torch.version.hip is not None)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    lists: Sequence[Tensor], blocks: tuple[int, int], scale: float, launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp, shares)."""
    q, k, v = (rows_without_gaps(x) for x in (q, k, v))
    out, lse = like_output(q)
    shares = like_columns(lse, classes)
    forward_kernel[_grid(lists, blocks[0], launch, q.shape[1])](
        q, k, v, mass, bias, classes, out, lse, shares, *lists,
        scale / LN2, q.shape[2], k.shape[2], len(lists[0]) // len(q), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **_shape(q, k, blocks), **_steps(launch),
    )  # fmt: skip
    return out, lse, shares


class Backward(NamedTuple):
    """What the kernels of the backward pass read.

    Attributes:
        q, k, v: the inputs.
        bias: `[B, H, Sq, 8]`, or None.
        classes: `[B, Sk]`, or None.
        d_out: `[B, H, Sq, D]`, the gradient of the output.
        d_shares: `[B, H, Sq, 8]`, the gradient of the shares, or None.
        lse: of the forward pass.
        delta: `[B, H, Sq]`, by `run_delta`.
        blocks: of the plan.
        scale: of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    classes: Tensor | None
    d_out: Tensor
    d_shares: Tensor | None
    lse: Tensor
    delta: Tensor
    blocks: tuple[int, int]
    scale: float

    def arguments(self, lists: Sequence[Tensor], *gradients: Tensor) -> tuple[Any, ...]:
        """In the order of the kernels of either gradient."""
        inputs = (self.q, self.k, self.v, self.d_out, self.bias, self.classes, self.d_shares, self.lse, self.delta)
        strides = [stride for x in (self.q, self.k, self.v, self.d_out) for stride in x.stride()[:3]]
        sizes = (self.q.shape[2], self.k.shape[2], len(lists[0]) // len(self.q))
        return (*inputs, *gradients, *lists, self.scale / LN2, self.scale, *sizes, *strides)


def run_delta(
    out: Tensor, d_out: Tensor, d_lse: Tensor | None, shares: Tensor, d_shares: Tensor | None, launch: Launch
) -> Tensor:
    """`[B, H, Sq]`: how far the scores of a row move together; `d_lse` is of the log-sum-exp in log2."""
    batch, heads, queries, head_dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=sums(out), device=out.device)
    delta_kernel[(-(-queries // launch.rows), heads, batch)](
        out, d_out, d_lse, shares, d_shares, delta, queries, *d_out.stride()[:3],
        R=launch.rows, num_warps=launch.warps, D=head_dim, W=padded(head_dim), ACC=_accumulator(out),
    )  # fmt: skip
    return delta


def run_dq(saved: Backward, lists: Sequence[Tensor], launch: Launch) -> tuple[Tensor, Tensor]:
    """(gradient of q, gradient of the bias); `lists` are by query."""
    dq, d_bias = saved.q.new_empty(saved.q.shape), like_columns(saved.delta, saved.bias)
    dq_kernel[_grid(lists, saved.blocks[0], launch, saved.q.shape[1])](
        *saved.arguments(lists, dq, d_bias), **_shape(saved.q, saved.k, saved.blocks), **_steps(launch)
    )
    return dq, d_bias


def run_dkv(saved: Backward, lists: Sequence[Tensor], launch: Launch) -> tuple[Tensor, Tensor]:
    """(gradient of k, gradient of v); `lists` are by key."""
    dk, dv = saved.k.new_empty(saved.k.shape), saved.k.new_empty(saved.k.shape)
    dkv_kernel[_grid(lists, saved.blocks[1], launch, saved.k.shape[1])](
        *saved.arguments(lists, dk, dv), **_shape(saved.q, saved.k, saved.blocks), **_steps(launch)
    )
    return dk, dv


def run_decode(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, lists: Sequence[Tensor], blocks: tuple[int, int],
    scale: float, launch: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp) of few queries, the keys split among programs."""
    q, k, v = (rows_without_gaps(x) for x in (q, k, v))
    batch, heads, queries, head_dim = q.shape
    key_heads, keys = k.shape[1:3]
    out, lse = like_output(q)
    rows = padded(queries * heads // key_heads)
    splits = decode_splits(batch * key_heads, keys, blocks[1])
    part = torch.empty(batch, key_heads, splits, rows, head_dim, dtype=lse.dtype, device=q.device)
    part_lse = torch.empty(part.shape[:-1], dtype=lse.dtype, device=q.device)
    shape: dict[str, Any] = {"GROUP": heads // key_heads, "D": head_dim, "W": padded(head_dim)}
    shape |= {"SPLITS": splits, "R": rows}
    decode_kernel[(batch, key_heads, splits)](
        q, k, v, part, part_lse, *lists[1:], scale / LN2, queries, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        BLOCK_Q=blocks[0], BLOCK_K=blocks[1], C=launch.columns, ACC=_accumulator(q), PRECISION=_precision(q),
        num_warps=launch.warps, **shape,
    )  # fmt: skip
    merge_kernel[(queries, heads, batch)](part, part_lse, mass, out, lse, queries, **shape)
    return out, lse


def run_statistics(
    q: Tensor, k: Tensor, mass: Tensor | None, bias: Tensor | None, classes: Tensor,
    lists: Sequence[Tensor], blocks: tuple[int, int], scale: float, launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(shares, entropy, largest score), the last two in units of log2."""
    q, k = rows_without_gaps(q), rows_without_gaps(k)
    entropy, peak = (torch.empty(q.shape[:3], dtype=sums(q), device=q.device) for _ in range(2))
    shares = like_columns(peak, classes)
    statistics_kernel[_grid(lists, blocks[0], launch, q.shape[1])](
        q, k, mass, bias, classes, shares, entropy, peak, *lists,
        scale / LN2, q.shape[2], k.shape[2], len(lists[0]) // len(q), *q.stride()[:3], *k.stride()[:3],
        **_shape(q, k, blocks), **_steps(launch),
    )  # fmt: skip
    return shares, entropy, peak


def like_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for an output and its log-sum-exp."""
    return q.new_empty(q.shape), torch.empty(q.shape[:3], dtype=sums(q), device=q.device)


def like_columns(lse: Tensor, wanted: Tensor | None) -> Tensor:
    """`[B, H, Sq, 8]` like the log-sum-exp; empty if nothing is wanted."""
    return lse.new_empty((*lse.shape, MAX_CLASSES) if wanted is not None else 0)


def rows_without_gaps(x: Tensor) -> Tensor:
    """`x` with its last dimension laid out without gaps, as the kernels read it."""
    return x if x.stride(3) == 1 else x.contiguous()


def sums(q: Tensor) -> torch.dtype:
    """What sums over keys are kept in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _grid(lists: Sequence[Tensor], block: int, launch: Launch, heads: int) -> tuple[int, int]:
    return len(lists[0]) * (block // launch.rows), heads


def _shape(q: Tensor, k: Tensor, blocks: tuple[int, int]) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1], "D": q.shape[3], "W": padded(q.shape[3]),
        "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "ACC": _accumulator(q), "PRECISION": _precision(q),
    }  # fmt: skip


def _steps(launch: Launch) -> dict[str, int]:
    return {"R": launch.rows, "C": launch.columns, "num_warps": launch.warps, "num_stages": launch.stages}


def _accumulator(q: Tensor) -> tl.dtype:
    return tl.float64 if q.dtype == torch.float64 else tl.float32


def _precision(q: Tensor) -> str:
    """How products of float32 are rounded: as torch was told to do it everywhere."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
