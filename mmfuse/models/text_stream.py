"""The text-stream engine: media give keys and values to a layer's text, and issue no query.

A layer runs on the rows of text alone, so what media would cost in queries, attention rows and feed-forward network is
not spent, in training and in prefill. Its own weights make keys and values of the media state, which is either carried
from layer to layer or made anew by the strategy for each. Both kinds of keys enter the cache in the order of the
sequence, so decoding is what it always is.

Shapes: `B` samples, `S` tokens of this call, `T` of them text, `M` media, `D` hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfuse.models.attention import Recorder, Request
from mmfuse.models.layer_parts import LayerParts, Rotary
from mmfuse.models.passes import Pass, gather_rows, scatter_rows
from mmfuse.sequence import kept_index


class TextStream:
    """Runs the layers that a strategy with `MediaPath.KEYS` changes.

    Args:
        run: the pass; its new tokens must hold media.
        parts: the class that knows the decoder's layers.
    """

    def __init__(self, run: Pass, parts: type[LayerParts]) -> None:
        tokens = run.new
        self._run, self._parts, self._length, self._depth = run, parts, len(tokens), len(run.layers)
        self._text = kept_index(~tokens.is_media & ~tokens.is_pad)
        self._media = kept_index(tokens.is_media)
        self._order = _order(tokens.is_media, tokens.is_pad, self._text.shape[1])
        self._visibility = run.fusion.visibility(run.tokens).rows(run.cached).select(self._text)
        self._source = run.source(self._media)
        self._rotary = run.rotary(tokens.position, tokens.grid)
        self._positions = tokens.position.gather(1, self._text.clamp(min=0))

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Text `[B, T, D]` and media `[B, M, D]` of `hidden [B, S, D]`."""
        return gather_rows(hidden, self._text), gather_rows(hidden, self._media)

    def join(self, text: Tensor, media: Tensor | None = None) -> Tensor:
        """`[B, S, D]` with text and media at their slots; what is not given, and padding, is 0."""
        hidden = scatter_rows(text, self._text, self._length)
        return hidden if media is None else hidden + scatter_rows(media, self._media, self._length)

    def layer(self, index: int, layer: nn.Module, text: Tensor, media: Tensor) -> tuple[Tensor, Tensor]:
        """Text and media behind decoder layer `index`."""
        rotary, left = self._rotary(index), [media]

        def enter(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            # Called inside the layer, where sharded weights are gathered and checkpointing recomputes what is done.
            keys, values, left[0] = self._media_path(index, layer, media, _at(rotary, self._media))
            return self._merged(k, keys), self._merged(v, values)

        request = Request(self._visibility, self._run.attention, record=self._recorder(), enter=enter)
        text = self._run.call(layer, text, _at(rotary, self._text), self._positions, request)
        return text, left[0]

    def _media_path(self, index: int, layer: nn.Module, media: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of media for this layer, and the state that they are in behind it."""
        parts, fusion = self._parts(layer), self._run.fusion
        media = fusion.media_state(index, media, self._source)
        keys, values = parts.keys_and_values(media, rotary)
        if index + 1 < self._depth:  # behind the last layer nobody reads them
            if fusion.media_update.value_output:
                media = parts.attend_self(media, values)
            if fusion.media_update.feed_forward:
                media = parts.feed_forward(media)
        return keys, values, media

    def _merged(self, text: Tensor, media: Tensor) -> Tensor:
        """`[B, Hkv, S, Dh]` in the order of the sequence, of `[B, Hkv, T, Dh]` and `[B, Hkv, M, Dh]`."""
        both = torch.cat([text, media], dim=2)
        if self._order.shape[0] == 1:
            return both.index_select(2, self._order[0])
        return both.gather(2, self._order[:, None, :, None].expand(*both.shape[:2], -1, both.shape[3]))

    def _recorder(self) -> Recorder | None:
        """Puts the rows of text where they stand in the sequence; media have none."""
        record = self._run.record
        if record is None:
            return None

        def expanded(layer: int, weights: Tensor) -> None:
            heads = [scatter_rows(weights[:, head], self._text, self._length) for head in range(weights.shape[1])]
            record(layer, torch.stack(heads, dim=1))

        return expanded


def _order(is_media: Tensor, is_pad: Tensor, text: int) -> Tensor:
    """`[B, S]`: where each slot's key is in `[text, media]` (padding: any); one row `[1, S]` if all samples agree."""
    nth_text = (~is_media & ~is_pad).cumsum(1) - 1
    order = torch.where(is_media, text + is_media.cumsum(1) - 1, nth_text).clamp(min=0).masked_fill(is_pad, 0)
    return order[:1] if bool((order == order[:1]).all()) else order


def _at(rotary: Rotary, index: Tensor) -> Rotary:
    cos, sin = (part.expand(index.shape[0], -1, -1) for part in rotary)
    return gather_rows(cos, index), gather_rows(sin, index)
