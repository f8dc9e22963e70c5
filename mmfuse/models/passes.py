"""One pass through a decoder: what is the same for all of its layers, and how a layer is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from mmfuse.fusion.base import Fusion, MediaSource
from mmfuse.models.attention import AttentionFunction, EnteringCache, Recorder, Request
from mmfuse.models.layer_parts import Rotary
from mmfuse.sequence import TokenMap


@dataclass(frozen=True)
class Pass:
    """One pass through a decoder.

    Attributes:
        base: the decoder without its head.
        embeds: `[B, S, D]`, the tokens that are new in this call, media as their connectors made them.
        tokens: all tokens, cached ones first: `[B, cached + S]`.
        cached: how many tokens earlier calls have left in the cache.
        fusion: the strategy.
        cache: keys and values of earlier calls.
        attention: `attend` with the backend that was asked for, or what stands in for it.
        record: is given each layer's attention weights.
        features: for each modality what its encoder gave for the new media `[N, V, De]`.
        arrange: see `MediaSource`.
    """

    base: PreTrainedModel
    embeds: Tensor
    tokens: TokenMap
    cached: int
    fusion: Fusion
    cache: Cache | None
    attention: AttentionFunction
    record: Recorder | None
    features: dict[str, Tensor]
    arrange: dict[str, Callable[[Tensor], Tensor]]

    @cached_property
    def new(self) -> TokenMap:
        """The tokens of this call, `[B, S]`."""
        return self.tokens.columns(self.cached)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return list(cast(Any, self.base).layers)

    def norm(self, hidden: Tensor) -> Tensor:
        """The decoder's final norm."""
        normed: Tensor = cast(Any, self.base).norm(hidden)
        return normed

    def source(self, media_index: Tensor) -> MediaSource:
        """What the encoders gave for the media at `media_index [B, M]` of the new tokens."""
        place = self.new.modality.clone()
        for modality in place.unique().tolist():
            mine = self.new.modality == modality
            place[mine] = (mine.flatten().cumsum(0) - 1).reshape(place.shape)[mine]
        at = media_index.clamp(min=0)
        return MediaSource(self.features, self.new.modality.gather(1, at), place.gather(1, at), self.arrange)

    def rotary(self, position_ids: Tensor, grid: Tensor | None = None) -> Callable[[int], Rotary]:
        """The rotary embedding of each layer at `position_ids [B, N]`.

        Gemma 3 has one for each of its layer types, the others one for all. Decoders with three axes (M-RoPE) add
        the `grid [B, N, 3]` of media to the position; without it all axes agree.
        """
        module = cast(nn.Module, self.base.rotary_emb)
        if grid is not None and hasattr(module, "mrope_section"):
            position_ids = (position_ids.unsqueeze(-1) + grid).movedim(-1, 0)
        if "layer_type" not in inspect.signature(module.forward).parameters:
            shared = module(self.embeds, position_ids)
            return lambda _: shared
        types = self.base.config.layer_types
        by_type = {layer_type: module(self.embeds, position_ids, layer_type) for layer_type in set(types)}
        return lambda index: by_type[types[index]]

    def call(self, layer: nn.Module, hidden: Tensor, rotary: Rotary, position_ids: Tensor, request: Request) -> Tensor:
        """Run one decoder layer as its own model does. `request.enter` is applied where keys are cached, or without."""
        cache = self.cache
        if cache is not None and request.enter is not None:
            cache, request = EnteringCache(cache, request.enter), replace(request, enter=None)
        out: Tensor = layer(
            hidden,
            attention_mask=request,
            position_embeddings=rotary,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x [B, S, D]` at `index [B, N]`; where the index is -1 stands some row, which a mask must hide."""
    return x.gather(1, index.clamp(min=0).unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def scatter_rows(x: Tensor, index: Tensor, length: int) -> Tensor:
    """`[B, length, D]` with the rows of `x [B, N, D]` at `index [B, N]` (-1: nowhere) and 0 elsewhere."""
    # A last row catches what belongs nowhere.
    at = index.where(index >= 0, length).unsqueeze(-1).expand_as(x)
    return x.new_zeros(x.shape[0], length + 1, x.shape[-1]).scatter(1, at, x)[:, :length]
