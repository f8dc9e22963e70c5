"""When has a model read its media? Media are hidden from a layer on, and answers scored again (the exit-layer curve).

Where the curve is flat from some layer on, later layers take nothing more from media tokens, which is what strategies
that let media leave early (DyVTE) or give them no queries (SAISA, EE-MLLM) build on. At 0 no layer reads media at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmfuse.fusion.base import Fusion, MediaPath
from mmfuse.kernels import Visibility
from mmfuse.models import MultimodalLM
from mmfuse.models.attention import Request
from mmfuse.sequence import TokenMap


@contextmanager
def media_until(model: MultimodalLM, layer: int, tokens: TokenMap) -> Iterator[Fusion]:
    """Inside the block, the decoder layers from `layer` on see no media; pass the strategy that it gives to `forward`.

    Args:
        model: its weights and its strategy are not changed.
        layer: the first layer without media; the number of layers hides nothing.
        tokens: the map of the batch that is run inside the block.
    """
    fusion = model.fusion
    if fusion.media_path is MediaPath.ASIDE or fusion.adjusts_keys:
        # Beside the mask, media reach text through what such a strategy adds to a layer: it is off from `layer` on.
        fusion = copy.copy(fusion)
        fusion.layers = tuple(index for index in range(layer) if model.fusion.changes(index))
    if fusion.media_path is MediaPath.ASIDE:
        # The layers that it does not change run on text alone, whose keys are not those of the sequence.
        yield fusion
        return

    def hide(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        request: Request = kwargs["attention_mask"]
        hidden = replace(request, visibility=without_media(request.visibility, tokens.is_media))
        return args, {**kwargs, "attention_mask": hidden}

    layers: Any = model.decoder.model.layers
    with ExitStack() as stack:
        for module in list(layers)[layer:]:
            stack.callback(module.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield fusion


def without_media(visibility: Visibility, is_media: Tensor) -> Visibility:
    """The same with the keys of media hidden; `is_media [B, S]` is by slot of the sequence."""
    keys = visibility.keys
    hidden = is_media.gather(1, keys.slot.clamp(min=0))
    seen = replace(keys, document=keys.document.masked_fill(hidden, -1))
    return Visibility(visibility.queries, seen, visibility.rules, visibility.names, visibility.window)
