"""Media beside the sequence: the decoder reads text alone, and looks at media through cross-attention.

The decoder's tokens, positions and cache are those of the text by itself. What a layer reads of media is computed once
and kept in the cache beside it: as keys and values of a cross-attention in front of the layer (Flamingo), or as further
keys in the softmax of the layer's own attention (mPLUG-Owl3).

Shapes: `B` samples, `S` tokens of this call, `T` of them text, `M` media tokens so far, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from mmfuse.fusion.base import Look
from mmfuse.kernels import Visibility
from mmfuse.kernels.attention import attention_weights
from mmfuse.models.attention import Recorder, Request
from mmfuse.models.layer_parts import LayerParts
from mmfuse.models.passes import Pass, gather_rows, scatter_rows
from mmfuse.sequence import kept_index, order_among


class AsideCache(DynamicCache):
    """Keys and values of the text, and beside them those of the media.

    Attributes:
        slots: how many tokens of the TokenMap the cache stands for, media included.
        text: `[B, K]`, the slot of each cached key of text; -1 is padding.
        places: `[B, M]`, the slot of each media token; -1 is padding.
        media: for each layer that looks at media its keys and values, both `[B, heads, M, width]`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slots = 0
        self.text: Tensor | None = None
        self.places: Tensor | None = None
        self.media: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.slots

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a cache with media beside it cannot be cropped")

    def reset(self) -> None:
        super().reset()
        self.slots, self.text, self.places, self.media = 0, None, None, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.text is not None:
            self._take(torch.arange(len(self.text), device=self.text.device).repeat_interleave(repeats))

    def _take(self, index: Tensor) -> None:
        self.text = None if self.text is None else self.text[index.to(self.text.device)]
        self.places = None if self.places is None else self.places[index.to(self.places.device)]
        self.media = {layer: (k[index.to(k.device)], v[index.to(v.device)]) for layer, (k, v) in self.media.items()}


class AsideLayers:
    """Runs all layers of a decoder under a strategy with `MediaPath.ASIDE`.

    Args:
        run: the pass.
        parts: the class that knows the decoder's layers.

    Raises:
        TypeError: the cache has no place for media.
    """

    def __init__(self, run: Pass, parts: type[LayerParts]) -> None:
        if run.cache is not None and not isinstance(run.cache, AsideCache):
            raise TypeError(
                f"{type(run.fusion).__name__} keeps media beside the sequence and cannot use a "
                f"{type(run.cache).__name__}; make one with model.new_cache()"
            )
        self._run, self._parts, self._cache = run, parts, run.cache
        tokens = run.tokens
        is_text = ~tokens.is_media & ~tokens.is_pad
        # A sliding window of the cache is counted in keys, so padding must not stand between those of text.
        self._text = kept_index(is_text[:, run.cached :], "right" if self._cache is None else "left")
        self._media = kept_index(run.new.is_media)
        text, places = self._remember(self._slots(self._text), self._slots(self._media))
        whole = run.fusion.visibility(tokens)
        self._self = whole.select(self._slots(self._text), text)
        self._cross = whole.select(self._slots(self._text), places)
        self._joined = Visibility(
            self._self.queries, self._self.keys.followed_by(self._cross.keys), whole.rules, whole.names
        )
        self._keys, self._places = text, places
        order = order_among(is_text, tokens.document)
        self._positions = order.gather(1, self._slots(self._text).clamp(min=0))
        self._rotary = run.rotary(self._positions)
        self._media_rotary = run.rotary(order.gather(1, self._slots(self._media).clamp(min=0)))

    def _slots(self, index: Tensor) -> Tensor:
        return torch.where(index >= 0, index + self._run.cached, -1)

    def _remember(self, text: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of all keys of text and of all media, cached ones first; of media there is one, if only padding."""
        cache = self._cache
        if cache is not None and cache.text is not None and cache.places is not None:
            text, places = torch.cat([cache.text, text], dim=1), torch.cat([cache.places, places], dim=1)
        elif places.shape[1] == 0:
            self._media = places = F.pad(places, (0, 1), value=-1)
        if cache is not None:
            cache.text, cache.places, cache.slots = text, places, len(self._run.tokens)
        return text, places

    def __call__(self) -> Tensor:
        """Hidden states `[B, S, D]` behind the final norm; rows of media are 0."""
        run = self._run
        text, media = gather_rows(run.embeds, self._text), gather_rows(run.embeds, self._media)
        for index, layer in enumerate(run.layers):
            text = self._layer(index, layer, text, media)
        return scatter_rows(run.norm(text), self._text, len(run.new))

    def _layer(self, index: int, layer: nn.Module, text: Tensor, media: Tensor) -> Tensor:
        run = self._run
        seen: list[Tensor] = []
        request = Request(self._self, run.attention, record=self._recorder(self._keys, seen))
        if run.fusion.changes(index):
            media_keys = partial(self._media_keys, index, layer, media)
            if not text.shape[1]:
                media_keys()
            elif run.fusion.joins_attention:
                record = self._recorder(torch.cat([self._keys, self._places], dim=1))
                # Made inside the layer, where sharded weights are gathered: its norm is applied to media.
                request = Request(self._joined, run.attention, record, media=media_keys)
            else:
                text = run.fusion.cross_attend(index, text, self._look(*media_keys(), seen))
        if not text.shape[1]:
            return text
        return run.call(layer, text, self._rotary(index), self._positions, request)

    def _media_keys(self, index: int, layer: nn.Module, media: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all media so far; those of the new ones are added to the cache."""
        fusion, parts = self._run.fusion, self._parts(layer)
        held = self._cache.media.get(index) if self._cache is not None else None
        if held is not None and not self._media.shape[1]:
            return held
        if fusion.joins_attention:
            keys, values = fusion.media_keys(index, parts.normalize(media))
            keys = parts.place(keys, self._media_rotary(index))
        else:
            keys, values = fusion.media_keys(index, media)
        if held is not None:
            keys, values = torch.cat([held[0], keys], dim=2), torch.cat([held[1], values], dim=2)
        if self._cache is not None:
            self._cache.media[index] = keys, values
        return keys, values

    def _look(self, keys: Tensor, values: Tensor, seen: list[Tensor]) -> Look:
        def look(queries: Tensor) -> Tensor:
            if self._run.record is not None:
                seen.append(attention_weights(queries, keys, self._cross))
            return self._run.attention(queries, keys, values, self._cross)

        return look

    def _recorder(self, keys: Tensor, seen: Sequence[Tensor] = ()) -> Recorder | None:
        """Puts weights of `keys [B, K]` where they stand in the sequence, with what a cross-attention has `seen`."""
        record = self._run.record
        if record is None:
            return None

        def expanded(layer: int, weights: Tensor) -> None:
            whole = self._spread(weights, keys[:, -weights.shape[3] :])
            for cross in seen:
                # Its heads are others than the layer's: their mean is shown beside each.
                mean = cross.mean(1, keepdim=True).expand(-1, weights.shape[1], -1, -1)
                whole = whole + self._spread(mean, self._places)
            record(layer, whole)

        return expanded

    def _spread(self, weights: Tensor, keys: Tensor) -> Tensor:
        """`[B, H, S, all slots]` of `[B, H, T, K]`, whose keys stand at the slots `keys [B, K]`."""
        new, total = len(self._run.new), len(self._run.tokens)
        rows = torch.stack([scatter_rows(head, self._text, new) for head in weights.unbind(1)], dim=1)
        columns = [scatter_rows(head.transpose(1, 2), keys, total).transpose(1, 2) for head in rows.unbind(1)]
        return torch.stack(columns, dim=1)
