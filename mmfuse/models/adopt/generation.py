"""Hugging Face's `generate` for an adopted model: images are encoded once, before beams repeat samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfuse.models.adopt.base import Adapter, EncodedMedia
from mmfuse.models.generation import MultimodalGenerationMixin
from mmfuse.sequence import TokenMap


class AdoptedGenerationMixin(MultimodalGenerationMixin):
    """What `generate` asks of an `AdoptedLM`.

    Attributes:
        adapter: what mmfuse knows of the architecture.
    """

    adapter: Adapter

    def encode_media(self, inputs: Mapping[str, Tensor]) -> EncodedMedia | None:
        """The images among the `inputs` behind tower and projector."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, input_ids: Tensor, tokens: TokenMap | None = None, media: EncodedMedia | None = None, **kwargs: Any
    ) -> Any:
        """Hugging Face's `generate` for what the model's own processor gives; prompts are padded on the left.

        Args:
            input_ids: `[B, S]` prompts up to and including the answer header.
            tokens: their map; made of what the processor gives if it is not given.
            media: images that `encode_media` has encoded.
            **kwargs: `pixel_values` and what else the processor gives, and everything that Hugging Face's `generate`
                takes. Labels are left out: nothing is supervised here.

        Raises:
            ValueError: a prompt is padded on the right.
        """
        kwargs.pop("labels", None)
        names = (*self.adapter.image_inputs, *self.adapter.token_inputs)
        given = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        media = self.encode_media(given) if media is None else media
        if tokens is None:
            tokens = self.token_map(input_ids, kwargs.get("attention_mask"), media=media, **given)  # type: ignore[call-arg]
        return super().generate(input_ids, tokens, media=media, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, *, tokens: TokenMap, media: EncodedMedia | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        made = super().prepare_inputs_for_generation(input_ids, tokens=tokens, **kwargs)
        new = tokens.columns(len(tokens) - made["input_ids"].shape[1])
        return {**made, "media": media if bool(new.is_media.any()) else None}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, media: EncodedMedia | None = None, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        if media is not None and expand_size > 1:
            cache = kwargs.get("past_key_values")
            cached = cache.get_seq_length() if cache is not None else 0
            media = media.repeat(kwargs["tokens"].columns(cached).is_media.sum(1).tolist(), expand_size)
        ids, made = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        return ids, {**made, "media": media}
