"""LLaVA-1.5, and LLaVA-NeXT and LLaVA-OneVision with images of any resolution in tiles.

Papers: LLaVA-1.5, arXiv 2310.03744; LLaVA-OneVision, arXiv 2408.03326.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmfuse.models.adopt.base import Adapter, Inputs, inner


class Llava(Adapter):
    """LLaVA-1.5: one image, one grid of tokens."""

    image_inputs = ("pixel_values", "image_sizes")
    token_inputs = ("mm_token_type_ids",)


class LlavaNext(Adapter):
    """LLaVA-NeXT: an overview and tiles of one image, packed with a learned token behind each row."""

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    token_inputs = ("mm_token_type_ids",)
    fixed_length = False

    def connector_parameters(self, vlm: PreTrainedModel) -> list[nn.Parameter]:
        return [inner(vlm).image_newline]

    def blank(self, vlm: PreTrainedModel) -> dict[str, Tensor]:
        size = vlm.config.vision_config.image_size
        tiles = image_size_to_num_patches([size, size], vlm.config.image_grid_pinpoints, size)
        return {
            "pixel_values": torch.zeros(1, tiles, 3, size, size),
            "image_sizes": torch.tensor([[size, size]]),
        }

    def arrange(self, vlm: PreTrainedModel, projected: Tensor, inputs: Inputs) -> Tensor:
        tiles = projected.split(self.tiles(vlm, inputs))
        packed, _ = inner(vlm).pack_image_features(
            tiles, inputs["image_sizes"], image_newline=inner(vlm).image_newline, **self.packing(vlm)
        )
        return torch.cat(packed)

    def tiles(self, vlm: PreTrainedModel, inputs: Inputs) -> list[int]:
        """How many tiles each image was cut into, the overview included."""
        config = vlm.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in inputs["image_sizes"]
        ]

    def packing(self, vlm: PreTrainedModel) -> dict[str, Any]:
        """What `pack_image_features` takes beside images."""
        return {"vision_feature_select_strategy": vlm.config.vision_feature_select_strategy}


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: like LLaVA-NeXT, with large grids scaled down, and several images without tiles."""

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")

    def tiles(self, vlm: PreTrainedModel, inputs: Inputs) -> list[int]:
        counts = inputs.get("batch_num_images")
        tiled = [True] * len(inputs["image_sizes"])
        if counts is not None:
            tiled = [count == 1 for count in counts.tolist() for _ in range(count)]
        return [tiles if cut else 1 for tiles, cut in zip(super().tiles(vlm, inputs), tiled, strict=True)]

    def packing(self, vlm: PreTrainedModel) -> dict[str, Any]:
        return {"vision_aspect_ratio": vlm.config.vision_aspect_ratio}
