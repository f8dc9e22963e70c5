"""The base class of fusion strategies: how media and text tokens meet inside the decoder.

Every hook has a default that means "plain causal LLaVA". A strategy overrides what it changes and nothing else.

Shapes: `B` samples, `S` slots, `M` media tokens, `D` hidden size, `Hkv` key heads, `Dh` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmfuse.fusion.flops import causal_flops, text_stream_flops
from mmfuse.fusion.shape import DecoderShape
from mmfuse.kernels import Axis, Condition, Rules, Visibility
from mmfuse.kernels.neighbourhood import Window2D
from mmfuse.sequence import Modality, TokenMap

MEDIA, PROMPT, ANSWER = range(3)
CLASSES = ("media", "prompt", "answer")

#: Every token sees itself and what came before it.
CAUSAL_RULES: Rules = {(q, k): (Condition.CAUSAL,) for q in range(len(CLASSES)) for k in range(len(CLASSES))}

#: Text sees itself and what came before it, media included; media see nothing.
TEXT_ROWS: Rules = {pair: rule for pair, rule in CAUSAL_RULES.items() if pair[0] != MEDIA}

IGNORED_LABEL = -100

#: Attention of queries `[B, heads, T, width]` over the `media_keys` that they may see.
Look = Callable[[Tensor], Tensor]

#: Builds one more connector like the model's own for a modality, with parameters of its own.
NewConnector = Callable[[str], nn.Module]


class MediaPath(Enum):
    """How media tokens go through the decoder layers that a strategy changes.

    ROWS: as rows of the layer, like text. KEYS: they issue no query; the layer runs on the rows of text, and its own
    weights make keys and values of media. ASIDE: they are not in the decoder's sequence at all.
    """

    ROWS = "rows"
    KEYS = "keys"
    ASIDE = "aside"


@dataclass(frozen=True)
class MediaUpdate:
    """What a layer under `MediaPath.KEYS` does to the state of media, all with its own weights.

    Attributes:
        value_output: add `O(V(LN x))`, which is attention of each token to itself alone.
        feed_forward: add `FFN(LN x)`.
    """

    value_output: bool = False
    feed_forward: bool = False


@dataclass(frozen=True)
class MediaSource:
    """What encoders gave for the media of a batch, and where it belongs.

    Attributes:
        features: for each modality the encoder's output `[N, V, De]`, before the connector.
        modality: `[B, M]`, the `Modality` of each media token.
        place: `[B, M]`, which token of its modality it is, counted over the batch in reading order.
    """

    features: Mapping[str, Tensor]
    modality: Tensor
    place: Tensor

    def through(self, project: Callable[[str, Tensor], Tensor]) -> Tensor:
        """`[B, M, D]` of the features after `project(modality, [N, V, De]) -> [N, V', D]`, laid out as the media are.

        Every modality is projected, whether it has tokens here or not, so that all ranks use the same parameters.
        """
        state: Tensor | None = None
        for name, features in self.features.items():
            tokens = project(name, features).flatten(0, 1)
            laid = tokens[self.place.clamp(max=len(tokens) - 1)]
            here = (self.modality == Modality[name.upper()]).unsqueeze(-1)
            state = torch.where(here, laid, torch.zeros_like(laid) if state is None else state)
        assert state is not None, "media without features"
        return state


class Fusion(nn.Module):
    """Who sees whom in the decoder, and what else a strategy adds to it.

    Args:
        layers: the decoder layers that the strategy changes; None means all. The other layers run the strategy's
            base, plain causal attention unless its docstring says otherwise. With `layers=[]` the strategy is off and
            the decoder is that base, bit for bit.
    """

    #: Whether prompt or media tokens may see tokens that come after them, so that a loss on them would be a leak.
    shows_future: ClassVar[bool] = False
    #: Whether `adjust_keys` does anything.
    adjusts_keys: ClassVar[bool] = False
    #: Under `MediaPath.ASIDE`: whether media keys join the softmax of a layer's own attention.
    joins_attention: ClassVar[bool] = False

    media_path: MediaPath = MediaPath.ROWS
    #: Under `MediaPath.KEYS`.
    media_update: MediaUpdate = MediaUpdate()

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layers = None if layers is None else tuple(layers)

    def visibility(self, tokens: TokenMap) -> Visibility:
        """Who sees whom in the layers that the strategy changes: `(B, S, S)` for `tokens [B, S]`."""
        return base_visibility(tokens)

    # What a strategy builds

    def build(self, shape: DecoderShape, new_connector: NewConnector, modalities: Sequence[str]) -> None:
        """Create the strategy's parameters for a decoder of this `shape`. The model calls it once."""

    def start_from(self, connectors: Mapping[str, nn.Module]) -> None:
        """Initialise parameters from the model's trained connectors: at first, and when a stage begins to tune them."""

    # What a strategy does in a layer that it changes

    def adjust_keys(self, layer: int, k: Tensor, v: Tensor, tokens: TokenMap) -> Tensor:
        """New keys for `k [B, Hkv, S, Dh]` (positions are in them), with which they enter the cache.

        Args:
            layer: index of the decoder layer.
            k: keys of the tokens of this call.
            v: their values, same shape.
            tokens: what these tokens are, `[B, S]`.
        """
        return k

    def softmax_mass(self, tokens: TokenMap) -> Tensor | None:
        """`[B, S]`, what `attend` takes as `mass`; None if nothing is added."""
        return None

    def media_state(self, layer: int, carried: Tensor, source: MediaSource) -> Tensor:
        """Under `MediaPath.KEYS`: what media are when they enter the layer, `[B, M, D]`.

        Args:
            layer: index of the decoder layer.
            carried: `[B, M, D]`, what the layer before left; the connector's output in the first.
            source: what the encoders gave.
        """
        return carried

    def media_keys(self, layer: int, media: Tensor) -> tuple[Tensor, Tensor]:
        """Under `MediaPath.ASIDE`: keys and values of `media [B, M, D]`, both `[B, heads, M, width]`."""
        raise NotImplementedError

    def cross_attend(self, layer: int, hidden: Tensor, look: Look) -> Tensor:
        """Under `MediaPath.ASIDE`: text `[B, T, D]` after it looked at media, in front of the decoder layer.

        Not called where `joins_attention`.
        """
        raise NotImplementedError

    # Which layers

    def changes(self, layer: int) -> bool:
        """Whether decoder layer `layer` runs under this strategy."""
        return self.layers is None or layer in self.layers

    def check_layers(self, count: int) -> None:
        """Raise ValueError if `layers` names one that a decoder of `count` layers does not have."""
        for layer in self.layers or ():
            if not 0 <= layer < count:
                raise ValueError(f"{type(self).__name__}(layers=…) names layer {layer}; the decoder has 0..{count - 1}")

    # What a strategy costs, as its paper counts

    def layer_flops(self, shape: DecoderShape, text: int, visual: int) -> int:
        """FLOPs of a layer that the strategy changes, for one sample (see `mmfuse.fusion.flops`).

        The defaults are those of a strategy that changes the mask alone, or media under `MediaPath.KEYS`.
        """
        if self.media_path is MediaPath.KEYS:
            update = self.media_update
            return text_stream_flops(shape, text, visual, value_output=update.value_output, ffn=update.feed_forward)
        return causal_flops(shape, text, visual)

    def convention_flops(self, shape: DecoderShape, text: int, visual: int) -> int:
        """FLOPs of all decoder layers for one sample; the layers that are not changed run the strategy's base."""
        changed = sum(self.changes(layer) for layer in range(shape.layers))
        base = causal_flops(shape, text, 0 if self.media_path is MediaPath.ASIDE else visual)
        return changed * self.layer_flops(shape, text, visual) + (shape.layers - changed) * base

    # What a strategy refuses

    def check_labels(self, tokens: TokenMap, labels: Tensor) -> None:
        """Raise ValueError if a token is supervised that has read, through others, what it should predict."""
        if not self.shows_future or self.layers == ():
            return
        supervised = (labels != IGNORED_LABEL) & ~tokens.is_answer
        if bool(supervised.any()):
            row, slot = (int(i) for i in supervised.nonzero()[0])
            raise ValueError(
                f"label at sample {row}, slot {slot} supervises a prompt token, but {type(self).__name__} lets tokens "
                f"before it see it: the loss would measure a leak. Set labels to {IGNORED_LABEL} outside answers"
            )

    def check_cached(self, tokens: TokenMap, cached: int) -> None:
        """Raise ValueError if the tokens from slot `cached` on would have changed states that are cached already.

        A strategy that shows the future needs a prompt's media and their text in one prefill.
        """
        added = tokens.columns(cached)
        if not self.shows_future or self.layers == () or bool((added.is_answer | added.is_pad).all()):
            return
        stale = self.stale_rows(tokens, cached)
        if bool(stale.any()):
            raise ValueError(
                f"sample {int(stale.nonzero()[0])}: {type(self).__name__} lets cached tokens see the prompt tokens "
                "that are being added, so the cache is stale. Prefill media and the prompt that speaks of them together"
            )

    def stale_rows(self, tokens: TokenMap, cached: int) -> Tensor:
        """bool `[B]`: the samples whose first `cached` tokens would have seen the tokens behind them."""
        return self.visibility(tokens).dense()[:, :cached, cached:].flatten(1).any(1)


def token_classes(tokens: TokenMap) -> Tensor:
    """`[B, S]` of MEDIA, PROMPT or ANSWER; padding counts as PROMPT and is excluded by its document."""
    classes = torch.where(tokens.is_answer, ANSWER, PROMPT)
    return torch.where(tokens.is_media, MEDIA, classes)


def axis_of(tokens: TokenMap, rank: Tensor | None = None, window: Window2D | None = None) -> Axis:
    """What rules need of `tokens [B, S]`; `rank` defaults to the order in the sequence.

    Args:
        tokens: of a batch.
        rank: causal order.
        window: what media tokens see under WINDOW_2D, by their places in `tokens.grid`.

    Raises:
        ValueError: a window, and tokens without a grid.
    """
    if window is not None and tokens.grid is None:
        raise ValueError("a 2-D window needs TokenMap.grid, the places (t, y, x) of media tokens, and it is None")
    places = (
        {} if window is None or tokens.grid is None else window.places(tokens.grid, tokens.segment, tokens.is_media)
    )
    slot = torch.arange(len(tokens), device=tokens.device).expand(tokens.shape)
    return Axis(
        document=tokens.document,
        rank=slot if rank is None else rank,
        segment=tokens.segment,
        turn=tokens.turn,
        cls=token_classes(tokens),
        slot=slot,
        ref=torch.full_like(tokens.segment, -1),
        **places,
    )


def base_visibility(tokens: TokenMap) -> Visibility:
    """Plain causal attention inside each document."""
    axis = axis_of(tokens)
    return Visibility(axis, axis, CAUSAL_RULES, CLASSES)
