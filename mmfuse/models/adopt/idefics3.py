"""Idefics3 and SmolVLM: an image is an overview and tiles, between which text says where each tile lies.

Papers: Idefics3, arXiv 2408.12637; SmolVLM, arXiv 2504.05299.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmfuse.models.adopt.base import Adapter, inner


class Idefics3(Adapter):
    """Idefics3 and SmolVLM: pixels come by sample, padded with empty images: `[B, images, 3, H, W]`."""

    image_inputs = ("pixel_values", "pixel_attention_mask")
    fixed_length = False

    def language_model(self, vlm: PreTrainedModel) -> nn.Module:
        found: nn.Module = inner(vlm).text_model
        return found

    def tower(self, vlm: PreTrainedModel) -> nn.Module:
        found: nn.Module = inner(vlm).vision_model
        return found

    def projector(self, vlm: PreTrainedModel) -> nn.Module:
        found: nn.Module = inner(vlm).connector
        return found

    def blank(self, vlm: PreTrainedModel) -> dict[str, Tensor]:
        (pixels,) = super().blank(vlm).values()
        # Images of zeros are padding here.
        return {"pixel_values": torch.ones(1, *pixels.shape)}
