"""Qwen2-VL and Qwen2.5-VL: images of any size as flat patches, and rotary positions with three axes (M-RoPE).

Papers: Qwen2-VL, arXiv 2409.12191; Qwen2.5-VL, arXiv 2502.13923.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from mmfuse.models.adopt.base import Adapter, Inputs, inner


class Qwen2VL(Adapter):
    """Qwen2-VL: images as flat patches, M-RoPE. No videos.

    Pixels are patches `[patches, channels · time · height · width]`; `image_grid_thw` counts them.
    """

    image_inputs = ("pixel_values", "image_grid_thw")
    token_inputs = ("mm_token_type_ids",)
    fixed_length = False

    def tower(self, vlm: PreTrainedModel) -> nn.Module:
        # The projector is a child of the tower here; the parts must not share parameters.
        children = inner(vlm).visual.named_children()
        return nn.ModuleDict({name: child for name, child in children if name != "merger"})

    def projector(self, vlm: PreTrainedModel) -> nn.Module:
        found: nn.Module = inner(vlm).visual.merger
        return found

    def blank(self, vlm: PreTrainedModel) -> dict[str, Tensor]:
        vision = vlm.config.vision_config
        side = vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}

    def positions(
        self, vlm: PreTrainedModel, input_ids: Tensor, live: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        grid_thw = inputs.get("image_grid_thw")
        if grid_thw is None:
            return super().positions(vlm, input_ids, live, inputs)
        is_image = (input_ids == vlm.config.image_token_id).long()
        axes, _ = inner(vlm).get_rope_index(
            input_ids, mm_token_type_ids=is_image, image_grid_thw=grid_thw, attention_mask=live
        )
        # The tokens of a still image share the position in time: it is where the image begins.
        return axes[0], (axes - axes[0]).movedim(0, -1)


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: the tower attends in windows, in whose order its projector sees the patches."""

    def arrange(self, vlm: PreTrainedModel, projected: Tensor, inputs: Inputs) -> Tensor:
        tower = inner(vlm).visual
        index, _ = get_vision_window_index(
            inputs["image_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return projected[torch.argsort(index)]
