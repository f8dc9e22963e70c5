"""The `sdpa` backend: torch's own `scaled_dot_product_attention`, causal or with a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfuse.kernels.visibility import Visibility


def sdpa(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None) -> Tensor:
    """torch's fused attention: without a mask where none is needed, causal where that is the rule, else dense."""
    grouped = q.shape[1] != k.shape[1]
    if mass is not None:
        return _sdpa_with_mass(q, k, v, visibility, scale, mass)
    if visibility.is_full():
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if visibility.is_causal():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        dead = visibility.queries.document < 0
    else:
        dead = visibility.dead_rows()
        # Fused kernels disagree about rows without a key: let those rows see all, and clear them below.
        mask = (visibility.dense() | dead.unsqueeze(2)).unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.masked_fill(dead[:, None, :, None], 0.0)


def _sdpa_with_mass(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor) -> Tensor:
    """The mass as the score of one more key: a column of q against a 1 in that key alone, with a value of 0."""
    finite = mass > -torch.inf
    score = (mass.masked_fill(~finite, 0.0).to(q.dtype) / scale)[:, None, :, None].expand(*q.shape[:3], 1)
    real, last = k.new_zeros(*k.shape[:3], 1), k.new_zeros(*k.shape[:2], 1, k.shape[3] + 1)
    last[..., -1] = 1.0
    keys = torch.cat([torch.cat([k, real], dim=-1), last], dim=2)
    # The value is as wide as the key, for the fused kernels that ask for it.
    values = torch.cat([torch.cat([v, real], dim=-1), torch.zeros_like(last)], dim=2)
    # A row that sees nothing is given this key, whose value is 0: fused kernels disagree about rows without a key.
    column = (finite | visibility.dead_rows()).unsqueeze(-1)
    mask = torch.cat([visibility.dense(), column], dim=-1).unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]
    queries = torch.cat([q, score], dim=-1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[..., :-1]
