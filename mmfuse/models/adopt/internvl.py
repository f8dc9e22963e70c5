"""InternVL in the Hugging Face format: tiles of an image one after the other, each in equally many tokens.

Paper: InternVL3, arXiv 2504.10479.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from mmfuse.models.adopt.base import Adapter, EncodedMedia, Inputs


class InternVL(Adapter):
    """InternVL: every tile is an image of its own in `pixel_values`; marks around it tell which belong together."""

    token_inputs = ("mm_token_type_ids",)

    def encode(self, vlm: PreTrainedModel, inputs: Inputs) -> EncodedMedia:
        return replace(super().encode(vlm, inputs), lengths=())
