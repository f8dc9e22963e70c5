"""What attention knows of token classes: a bias of the scores by class, and how much weight each class of keys gets.

Both are columns. With `E [Sk, C]`, the one-hot classes of the keys, and `B`, the bias of each query against each class,

    [q, B / scale] · [k, E] · scale = q · k · scale + B[class of the key]        weights · [v, E] = [out, shares]

so that any backend computes them exactly, and their gradients, on wider heads.

Shapes: `B` samples, `H` heads, `Hkv` key heads, `Sq` queries, `Sk` keys, `D` head width, `C` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfuse.kernels.visibility import MAX_CLASSES, Visibility


@dataclass(frozen=True)
class Statistics:
    """How the rows of a softmax are spread, over the keys that each sees.

    Attributes:
        shares: `[B, H, Sq, C]`, the weights of each row summed by the class of the key, in the order of the
            visibility's `names`.
        entropy: `[B, H, Sq]`, -Σ p log p in nats; 0 where a row sees nothing. A mass takes weight away from the keys
            and has no term of its own.
        max_logit: `[B, H, Sq]`, the largest score (scaled, with its bias); -inf where a row sees nothing.
    """

    shares: Tensor
    entropy: Tensor
    max_logit: Tensor


def class_columns(classes: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, S, 8]`: the one-hot of `classes [B, S]`."""
    return F.one_hot(classes.long(), MAX_CLASSES).to(dtype)


def bias_by_query(bias: Tensor, visibility: Visibility) -> Tensor:
    """`[B, H, Sq, 8]`: what each query adds to its scores with keys of each class, from `bias [H, C, C]`.

    A product with one-hot rows, and no lookup: its gradient is a product as well, with the same bits each run.
    """
    missing = MAX_CLASSES - bias.shape[-1]
    padded = F.pad(bias, (0, missing, 0, missing))
    return class_columns(visibility.queries.cls, bias.dtype).unsqueeze(1) @ padded


def with_class_columns(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`q`, `k` and `v` with columns behind their own that add the bias and give the shares of the classes.

    There are eight more columns, or sixteen where a bias meets numbers of 16 bits, which hold it in two parts.
    """
    batch, heads, queries, _ = q.shape
    one_hot = class_columns(visibility.keys.cls, k.dtype).unsqueeze(1).expand(-1, k.shape[1], -1, -1)
    if bias is None:
        nothing = q.new_zeros(batch, heads, queries, MAX_CLASSES)
        return torch.cat([q, nothing], -1), torch.cat([k, torch.zeros_like(one_hot)], -1), torch.cat([v, one_hot], -1)
    wide = torch.promote_types(q.dtype, torch.float32)
    wanted = bias_by_query(bias.to(wide), visibility) / scale
    coarse = wanted.to(q.dtype)
    if coarse.dtype == wide:
        return torch.cat([q, coarse], -1), torch.cat([k, one_hot], -1), torch.cat([v, one_hot], -1)
    fine = (wanted - coarse.detach().to(wide)).to(q.dtype)
    # The gradient reaches the bias once, through the finer part.
    queries_with = torch.cat([q, coarse.detach(), fine], -1)
    return (
        queries_with,
        torch.cat([k, one_hot, one_hot], -1),
        torch.cat([v, one_hot, torch.zeros_like(one_hot)], -1),
    )
