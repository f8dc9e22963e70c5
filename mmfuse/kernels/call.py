"""What a backend must know of a call, beside its Visibility, to say whether it can run it and at what cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfuse.errors import RunError


class BackendError(RunError, NotImplementedError):
    """A backend was asked for what it cannot compute; the message gives the reason and the backends that can."""


@dataclass(frozen=True)
class Call:
    """The shape of a call of `attend`.

    Attributes:
        heads: of the queries.
        width: of a head.
        dtype: of q, k and v.
        device: its type, as `cpu` or `cuda`.
        differentiable: whether gradients will be asked for.
        with_mass: whether a mass is given.
    """

    heads: int
    width: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    differentiable: bool = False
    with_mass: bool = False

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, bias: Tensor | None = None) -> Call:
        inputs = (q, k, v, mass, bias)
        differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        return Call(q.shape[1], q.shape[3], q.dtype, q.device.type, differentiable, mass is not None)
