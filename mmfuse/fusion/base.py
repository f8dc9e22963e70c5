"""The base class of fusion strategies: how media and text tokens meet inside the decoder.

Every hook has a default that means "plain causal LLaVA". A strategy overrides what it changes and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmfuse.kernels import Axis, Condition, Rules, Visibility
from mmfuse.sequence import TokenMap

MEDIA, PROMPT, ANSWER = range(3)
CLASSES = ("media", "prompt", "answer")

#: Every token sees itself and what came before it.
CAUSAL_RULES: Rules = {(q, k): (Condition.CAUSAL,) for q in range(len(CLASSES)) for k in range(len(CLASSES))}

IGNORED_LABEL = -100


class Fusion(nn.Module):
    """Who sees whom in the decoder, and what else a strategy adds to it.

    Args:
        layers: the decoder layers that the strategy changes; None means all. The other layers run the strategy's
            base, plain causal attention. With `layers=[]` the strategy is off and the decoder is that base, bit for
            bit.
    """

    #: Whether prompt or media tokens may see tokens that come after them, so that a loss on them would be a leak.
    shows_future: ClassVar[bool] = False

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layers = None if layers is None else tuple(layers)

    def visibility(self, tokens: TokenMap) -> Visibility:
        """Who sees whom in the layers that the strategy changes: `(B, S, S)` for `tokens [B, S]`."""
        return base_visibility(tokens)

    def changes(self, layer: int) -> bool:
        """Whether decoder layer `layer` runs under this strategy."""
        return self.layers is None or layer in self.layers

    def check_layers(self, count: int) -> None:
        """Raise ValueError if `layers` names one that a decoder of `count` layers does not have."""
        for layer in self.layers or ():
            if not 0 <= layer < count:
                raise ValueError(f"{type(self).__name__}(layers=…) names layer {layer}; the decoder has 0..{count - 1}")

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
        seen_by_cached = self.visibility(tokens).dense()[:, :cached, cached:]
        if bool(seen_by_cached.any()):
            row = int(seen_by_cached.flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"sample {row}: {type(self).__name__} lets cached tokens see the prompt tokens that are being added, "
                "so the cache is stale. Prefill media and the prompt that speaks of them together"
            )


def token_classes(tokens: TokenMap) -> Tensor:
    """`[B, S]` of MEDIA, PROMPT or ANSWER; padding counts as PROMPT and is excluded by its document."""
    classes = torch.where(tokens.is_answer, ANSWER, PROMPT)
    return torch.where(tokens.is_media, MEDIA, classes)


def axis_of(tokens: TokenMap, rank: Tensor | None = None) -> Axis:
    """What rules need of `tokens [B, S]`; `rank` defaults to the order in the sequence."""
    slot = torch.arange(len(tokens), device=tokens.device).expand(tokens.shape)
    return Axis(
        document=tokens.document,
        rank=slot if rank is None else rank,
        segment=tokens.segment,
        turn=tokens.turn,
        cls=token_classes(tokens),
        slot=slot,
        ref=torch.full_like(tokens.segment, -1),
    )


def base_visibility(tokens: TokenMap) -> Visibility:
    """Plain causal attention inside each document."""
    axis = axis_of(tokens)
    return Visibility(axis, axis, CAUSAL_RULES, CLASSES)
