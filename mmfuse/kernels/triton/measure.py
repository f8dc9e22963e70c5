"""Time every launch of the shortlist, kernel by kernel, on the shapes that a user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels.plan import BlockPlan
from mmfuse.kernels.triton.launch import Launch, shortlist
from mmfuse.kernels.triton.run import Backward, arguments_of, launch_for, run_delta, run_dkv, run_dq, run_forward
from mmfuse.kernels.triton.tuning import Trial, try_launches

#: The kernels that are tuned; the others take a small part of a step.
TUNED = ("forward", "dq", "dkv")

Time = Callable[[Callable[[], Any]], float]


def measure_launches(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, time: Time) -> dict[str, list[Trial]]:
    """The trials of each kernel.

    Args:
        q: `[B, H, Sq, D]` on a GPU, or on the CPU in the interpreter.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, D]`.
        plan: of the mask, on the same device.
        time: the median time of a call, in milliseconds.
    """
    by_query, by_key = arguments_of(plan.by_query, plan.words), arguments_of(plan.by_key, plan.words_t)
    blocks, scale = (plan.block_q, plan.block_k), q.shape[3] ** -0.5
    nothing = (None, None, None)

    def forward(launch: Launch) -> Sequence[Tensor]:
        return run_forward(q, k, v, *nothing, by_query, blocks, scale, launch)

    out, lse, shares = forward(launch_for("forward", q))
    d_out = torch.randn_like(out)
    delta = run_delta(out, d_out, None, shares, None, launch_for("delta", q))
    saved = Backward(q, k, v, None, None, d_out, None, lse, delta, blocks, scale)
    runs: dict[str, Callable[[Launch], Sequence[Tensor]]] = {
        "forward": lambda launch: forward(launch)[:2],
        "dq": lambda launch: run_dq(saved, by_query, launch)[:1],
        "dkv": lambda launch: run_dkv(saved, by_key, launch),
    }
    amd = torch.version.hip is not None
    return {
        kernel: try_launches(shortlist(kernel, q.shape[3], q.itemsize, amd=amd), runs[kernel], time) for kernel in TUNED
    }
