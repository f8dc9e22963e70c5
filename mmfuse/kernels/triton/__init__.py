"""The backend `triton`: flash attention over block lists, for any mask, forward and backward.

    launch.py      how large a step each kernel takes
    primitives.py  products, rows and bit tiles
    forward.py, backward.py, decode.py, statistics.py
                   the kernels
    operator.py    the kernels as torch operators

Triton itself is imported when the backend first runs: it decides then, by the variable TRITON_INTERPRET, whether
kernels are compiled for a GPU or run as Python on CPU tensors, which is how the tests run them.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mmfuse.kernels.call import Call
from mmfuse.kernels.classes import Statistics, bias_by_query
from mmfuse.kernels.plan import plan_blocks
from mmfuse.kernels.visibility import Visibility

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None
) -> Tensor:
    """The backend `triton` of `attend`."""
    from mmfuse.kernels.triton.operator import masked_attention

    return masked_attention(q, k, v, plan_blocks(visibility), scale=scale, mass=mass)[0]


def triton_with_shares(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output and the shares of the classes, summed in the kernels."""
    from mmfuse.kernels.triton.operator import masked_attention

    rows = _bias_of_rows(q, visibility, bias)
    plan, classes = plan_blocks(visibility), visibility.keys.cls
    out, _, shares = masked_attention(q, k, v, plan, scale=scale, mass=mass, bias=rows, classes=classes)
    return out, shares[..., : len(visibility.names)].to(q.dtype)


def triton_statistics(
    q: Tensor, k: Tensor, visibility: Visibility, scale: float, mass: Tensor | None, bias: Tensor | None
) -> Statistics:
    """Shares, entropy and largest score, in one pass over the keys."""
    from mmfuse.kernels.triton.operator import masked_statistics

    rows = _bias_of_rows(q, visibility, bias)
    plan, classes = plan_blocks(visibility), visibility.keys.cls
    shares, entropy, peak = masked_statistics(q, k, plan, classes, scale=scale, mass=mass, bias=rows)
    return Statistics(shares[..., : len(visibility.names)], entropy, peak)


def _bias_of_rows(q: Tensor, visibility: Visibility, bias: Tensor | None) -> Tensor | None:
    """`[B, H, Sq, 8]` from `[H, C, C]`, in float32 at least."""
    return None if bias is None else bias_by_query(bias.to(torch.promote_types(q.dtype, torch.float32)), visibility)


def refusal(visibility: Visibility, call: Call) -> str | None:
    """Why the kernels cannot run this call; None if they can."""
    if call.width > MAX_HEAD_DIM:
        return f"it takes head dims up to {MAX_HEAD_DIM}, got {call.width}"
    if find_spec("triton") is None:
        return "it needs the package triton, which is not installed here"
    from mmfuse.kernels.triton.primitives import INTERPRETED

    dtypes: tuple[torch.dtype, ...] = DTYPES
    if INTERPRETED:
        dtypes = (*DTYPES, torch.float64)
    elif call.device == "cpu":
        return (
            "it runs on a GPU, and these tensors are on the CPU (for tests, TRITON_INTERPRET=1 runs it there, slowly)"
        )
    if call.dtype not in dtypes:
        return f"it takes {', '.join(str(known).removeprefix('torch.') for known in dtypes)}, got {call.dtype}"
    return None
