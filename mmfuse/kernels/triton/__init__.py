"""The backend `triton`: flash attention over block lists, for any mask, forward and backward.

    launch.py      how large a step each kernel takes
    primitives.py  products, rows and bit tiles
    forward.py, backward.py, decode.py
                   the kernels
    operator.py    the kernels as torch operators

Triton itself is imported when the backend first runs: it decides then, by the variable TRITON_INTERPRET, whether
kernels are compiled for a GPU or run as Python on CPU tensors, which is how the tests run them.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mmfuse.errors import RunError
from mmfuse.kernels.plan import plan_blocks
from mmfuse.kernels.visibility import Visibility

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None
) -> Tensor:
    """The backend `triton` of `attend`.

    Raises:
        RunError: triton is missing, or does not run on these tensors; the message says why.
    """
    reason = refusal(q)
    if reason is not None:
        raise RunError(f"attention backend 'triton' {reason}")
    from mmfuse.kernels.triton.operator import masked_attention

    out, _ = masked_attention(q, k, v, plan_blocks(visibility), scale=scale, mass=mass)
    return out


def refusal(q: Tensor) -> str | None:
    """Why the kernels cannot run on queries such as `q`; None if they can."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed here"
    from mmfuse.kernels.triton.primitives import INTERPRETED

    dtypes: tuple[torch.dtype, ...] = DTYPES
    if INTERPRETED:
        dtypes = (*DTYPES, torch.float64)
    elif q.device.type == "cpu":
        return "runs on a GPU, and these tensors are on the CPU (for tests, TRITON_INTERPRET=1 runs it there, slowly)"
    if q.dtype not in dtypes:
        return f"takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {q.dtype}"
    return None
