"""What strategies share that keep media beside the text: which medium a text token refers to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmfuse.fusion.base import ANSWER, CLASSES, MEDIA, PROMPT, axis_of
from mmfuse.kernels import Axis, Condition, Rules, Visibility
from mmfuse.sequence import TokenMap, order_among

#: `latest`: the medium right before a token alone. `all`: every medium before it.
Reach = Literal["latest", "all"]

_TEXT = (PROMPT, ANSWER)
_TEXT_TO_TEXT: Rules = {(q, k): (Condition.CAUSAL,) for q in _TEXT for k in _TEXT}
_REACHES: dict[str, Condition] = {"latest": Condition.REF_SEGMENT, "all": Condition.CAUSAL}


def aside_visibility(tokens: TokenMap, reach: Reach) -> Visibility:
    """Text reads text causally and media by `reach`; media read nothing. Windows are measured in tokens of text."""
    axis = axis_of(tokens)
    order = order_among(~tokens.is_media & ~tokens.is_pad, tokens.document)
    axis = Axis(**{**axis.__dict__, "slot": order, "ref": latest_segment(tokens)})
    rules = {**_TEXT_TO_TEXT, **{(q, MEDIA): (_REACHES[reach],) for q in _TEXT}}
    return Visibility(axis, axis, rules, CLASSES)


def latest_segment(tokens: TokenMap) -> Tensor:
    """`[B, S]`: segment of the last media token at or before each slot in its document, -1 if there is none."""
    slots = torch.arange(len(tokens), device=tokens.device).expand(tokens.shape)
    last = torch.where(tokens.is_media, slots, -1).cummax(dim=1).values
    at = last.clamp(min=0)
    found = (last >= 0) & (tokens.document.gather(1, at) == tokens.document)
    return torch.where(found, tokens.segment.gather(1, at), -1)
