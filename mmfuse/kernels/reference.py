"""The `reference` backend: masked attention written out. It is the law that the other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.visibility import Visibility


def attention_weights(
    q: Tensor, k: Tensor, visibility: Visibility, *, scale: float | None = None, mass: Tensor | None = None
) -> Tensor:
    """The softmax weights themselves, `[B, H, Sq, Sk]`; rows that see nothing are 0."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = visibility.dense().unsqueeze(1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # A row without keys would be softmax over nothing: score it evenly, then weigh it by 0.
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    if mass is None:
        return scores.softmax(dim=-1) * seen
    unseen = mass.to(scores.dtype)[:, None, :, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, unseen], dim=-1).softmax(dim=-1)[..., :-1] * seen


def reference(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None) -> Tensor:
    """Softmax attention written out, in the dtype of its inputs; rows that see nothing give 0."""
    weights = attention_weights(q, k, visibility, scale=scale, mass=mass)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
