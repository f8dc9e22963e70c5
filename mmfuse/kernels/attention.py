"""`attend`: masked attention over a Visibility, the one entry point of every backend.

A backend computes exactly what was asked or refuses with the reason. The reference is the law: plain torch, any float
dtype, compared with the others forward and backward by the tests. Shapes: queries `[B, H, Sq, D]`, keys and values
`[B, Hkv, Sk, D]` with `H` a multiple of `Hkv` (grouped-query attention).

`mass [B, Sq]` is the logarithm of a weight that is added to the denominator of each row's softmax, as if the row also
saw one more key, with that score and value 0: the rows then sum to less than 1 (pseudo-scores, attention sinks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfuse.errors import unknown
from mmfuse.kernels.triton import triton_attention
from mmfuse.kernels.visibility import Visibility

Backend = Literal["auto", "reference", "sdpa", "triton"]


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


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Visibility, float, Tensor | None], Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "triton": triton_attention,
}

#: What a config or a caller may ask for.
BACKEND_NAMES = ("auto", *BACKENDS)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    mass: Tensor | None = None,
    backend: Backend | str = "auto",
) -> Tensor:
    """Attention of `q` over the keys that `visibility` shows it.

    Args:
        q: `[B, H, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, D]`.
        visibility: of shape `(B, Sq, Sk)`; queries that see nothing give 0 and get gradient 0.
        scale: of the scores; 1/sqrt(D) if None.
        mass: `[B, Sq]`, the logarithm of what is added to each row's softmax denominator; nothing if None.
        backend: `auto` is `sdpa` here.

    Returns:
        `[B, H, Sq, D]` in the dtype of `q`.

    Raises:
        TypeError: the mask is not a Visibility, or the inputs differ in dtype.
        ValueError: unknown backend, or shapes that do not belong together.
        RunError: the backend does not run here, or not on such tensors.
    """
    name = "sdpa" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(unknown("attention backend", backend, BACKEND_NAMES))
    _check(q, k, v, visibility, mass)
    return BACKENDS[name](q, k, v, visibility, q.shape[-1] ** -0.5 if scale is None else scale, mass)


def _check(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, mass: Tensor | None) -> None:
    if not isinstance(visibility, Visibility):
        raise TypeError(f"attend needs a Visibility, got {type(visibility).__name__}: masks are data here, not tensors")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"expected q [B,H,Sq,D] and k, v [B,Hkv,Sk,D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must share B and D, and H must be a multiple of Hkv")
    if visibility.shape != (q.shape[0], q.shape[2], k.shape[2]):
        raise ValueError(
            f"visibility is {visibility.shape} (B, Sq, Sk), but q and k ask for {(q.shape[0], q.shape[2], k.shape[2])}"
        )
    if mass is not None and mass.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"mass must be [B, Sq] = {[q.shape[0], q.shape[2]]}, got {list(mass.shape)}")
