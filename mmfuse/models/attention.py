"""The attention function of every decoder, and what our layer loop passes it.

Hugging Face layers hand on whatever stands in `attention_mask`. Ours is a `Request`: the Visibility of the layer's
rows, and what a strategy wants done with keys and values. A layer projects and rotates q, k and v as it always does.

Shapes: `B` samples, `S` tokens of this call, `H` heads, `Hkv` key heads, `Dh` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from mmfuse.kernels import Visibility, attend
from mmfuse.kernels.attention import attention_weights

#: The name under which our attention function is registered with transformers.
ATTENTION = "mmfuse"

#: `record(layer, weights [B, H, Sq, Sk])`, called by each layer whose attention is being looked at.
Recorder = Callable[[int, Tensor], None]

#: What computes attention: called as `attend` is, without a backend, and returns what it would.
AttentionFunction = Callable[..., Tensor]

#: From the keys and values `[B, Hkv, rows, Dh]` of the rows that a layer was given to those of all new tokens.
Enter = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# What decoders pass to their attention function beside q, k and v, and which changes nothing here: positions are
# already in q and k, and causality is in the Visibility.
_WITHOUT_EFFECT = {"position_ids", "use_cache", "is_causal", "cache_position"}


@dataclass(frozen=True)
class Request:
    """What a layer's attention should compute.

    Attributes:
        visibility: which keys its rows see.
        attention: `attend` with the backend that was asked for, or what stands in for it.
        record: is given the layer's weights.
        enter: applied to keys and values where they enter the cache, and at the same point without a cache.
        mass: `[B, rows]`, see `attend`.
        media: gives keys and values `[B, Hkv, M, Dh]` that stand behind the layer's own in the same softmax.
    """

    visibility: Visibility
    attention: AttentionFunction = attend
    record: Recorder | None = None
    enter: Enter | None = None
    mass: Tensor | None = None
    media: Callable[[], tuple[Tensor, Tensor]] | None = None


class EnteringCache(Cache):
    """A cache whose `update` first applies `enter`: what a strategy changes is what later calls find.

    Args:
        cache: where keys and values are kept.
        enter: what is done to them on their way.
    """

    def __init__(self, cache: Cache, enter: Enter) -> None:
        super().__init__(layers=cache.layers)
        self._cache = cache
        self._enter = enter

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(*self._enter(key_states, value_states), layer_idx, *args, **kwargs)


def visible_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Request,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """The attention function of every decoder: `[B, H, S, Dh]` in, `[B, S, H, Dh]` out.

    Raises:
        TypeError: the mask is not a Request.
        NotImplementedError: the decoder asks for something that would otherwise be ignored (dropout, soft-capping,
            attention sinks, …).
    """
    request = attention_mask
    if not isinstance(request, Request):
        raise TypeError(
            f"{type(module).__name__} runs under attn_implementation={ATTENTION!r} but was given a mask of type "
            f"{type(request).__name__}; call the model through MultimodalLM, which passes a Visibility"
        )
    refused = {name for name, value in asked.items() if value is not None and name not in _WITHOUT_EFFECT}
    if dropout:
        refused.add("attention dropout")
    if refused:
        raise NotImplementedError(
            f"{type(module).__name__} asks attention for {', '.join(sorted(refused))}, which mmfuse does not compute"
        )
    if request.enter is not None:
        key, value = request.enter(key, value)
    if request.media is not None:
        media = request.media()
        key, value = (torch.cat([own, other], dim=2) for own, other in zip((key, value), media, strict=True))
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave q and k in float32, and v comes from a Linear in the lower precision.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    # A sliding cache drops its oldest keys; those of media stand behind them and stay.
    visibility = request.visibility.view(window=sliding_window, keys=key.shape[2])
    if request.record is not None:
        weights = attention_weights(query, key, visibility, scale=scaling, mass=request.mass)
        request.record(module.layer_idx, weights)  # type: ignore[arg-type]
    out = request.attention(query, key, value, visibility, scale=scaling, mass=request.mass)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, visible_attention)
