"""The `reference` backend: masked attention written out. It is the law that the other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.kernels.classes import Statistics
from mmfuse.kernels.visibility import Visibility

#: Rows that statistics are taken of at a time, so that no more scores than these exist.
ROWS = 256


def _scores(q: Tensor, k: Tensor, visibility: Visibility, scale: float | None, bias: Tensor | None) -> Tensor:
    """`[B, H, Sq, Sk]`, of pairs that see each other and of those that do not."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is None:
        return scores
    pairs = visibility.queries.cls.long().unsqueeze(2), visibility.keys.cls.long().unsqueeze(1)
    return scores + bias.to(scores.dtype)[:, *pairs].transpose(0, 1)


def attention_weights(
    q: Tensor,
    k: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    mass: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The softmax weights themselves, `[B, H, Sq, Sk]`; rows that see nothing are 0."""
    seen = visibility.dense().unsqueeze(1)
    scores = _scores(q, k, visibility, scale, bias)
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


def reference_with_shares(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, and the weights of each row summed by the class of the key, `[B, H, Sq, C]`."""
    weights = attention_weights(q, k, visibility, scale=scale, mass=mass, bias=bias)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), _by_class(weights, visibility)


def _by_class(weights: Tensor, visibility: Visibility) -> Tensor:
    members = [(visibility.keys.cls == c)[:, None, None] for c in range(len(visibility.names))]
    return torch.stack([(weights * of).sum(-1) for of in members], dim=-1)


def reference_statistics(
    q: Tensor, k: Tensor, visibility: Visibility, scale: float, mass: Tensor | None, bias: Tensor | None
) -> Statistics:
    """Shares, entropy and largest score, some rows at a time."""
    slots = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
    parts = []
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        some, here = visibility.select(slots[:, rows]), q[:, :, rows]
        masses = None if mass is None else mass[:, rows]
        weights = attention_weights(here, k, some, scale=scale, mass=masses, bias=bias)
        hidden = ~some.dense().unsqueeze(1)
        most = _scores(here, k, some, scale, bias).masked_fill(hidden, -torch.inf).amax(-1)
        parts.append((_by_class(weights, some), torch.special.entr(weights).sum(-1), most))
    return Statistics(*(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))
