"""What an adopted vision-language model must be asked, and what its images are when they enter the decoder.

An adapter names the parts of one Hugging Face architecture and calls its own methods; it holds no weights and copies no
model code. `N` images, `T` image tokens of a batch in reading order, `D` hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmfuse.fusion import Causal, Fusion

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class EncodedMedia:
    """The images of a batch behind tower and projector.

    Attributes:
        tokens: `[T, D]`, in reading order.
        lengths: how many of them each image has, as far as the architecture says.
        features: what the projector was given, in the layout of the architecture.
        arrange: from the projector's output to `[T, D]` (any-resolution packing, reordering).
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    features: Tensor
    arrange: Callable[[Tensor], Tensor]

    def repeat(self, per_sample: list[int], times: int) -> EncodedMedia:
        """The media of a batch in which every sample, with `per_sample` tokens each, stands `times` times."""
        at = torch.arange(len(self.tokens), device=self.tokens.device)
        index = torch.cat([part for part in at.split(per_sample) for _ in range(times)])
        arrange = self.arrange
        return replace(self, tokens=self.tokens[index], lengths=(), arrange=lambda projected: arrange(projected)[index])


class Adapter:
    """An architecture as in LLaVA: `vlm.model` holds `vision_tower`, `multi_modal_projector` and `language_model`.

    Each method is given the Hugging Face model, since training tools may replace modules inside it.
    """

    #: What the architecture's `get_image_features` takes.
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    #: What else its processor gives for each token `[B, S]`.
    token_inputs: ClassVar[tuple[str, ...]] = ()
    #: Settings of the decoder's config that the native strategy computes.
    native_settings: ClassVar[tuple[str, ...]] = ()
    #: Whether every image becomes equally many tokens.
    fixed_length: ClassVar[bool] = True

    def language_model(self, vlm: PreTrainedModel) -> nn.Module:
        """The decoder without its head."""
        found: nn.Module = inner(vlm).language_model
        return found

    def tower(self, vlm: PreTrainedModel) -> nn.Module:
        """The vision encoder."""
        found: nn.Module = inner(vlm).vision_tower
        return found

    def projector(self, vlm: PreTrainedModel) -> nn.Module:
        """What maps the tower's features to the decoder's width."""
        found: nn.Module = inner(vlm).multi_modal_projector
        return found

    def connector_parameters(self, vlm: PreTrainedModel) -> list[nn.Parameter]:
        """Parameters between tower and decoder that are not the projector's."""
        return []

    def native(self, vlm: PreTrainedModel) -> Fusion:
        """The strategy that the architecture was trained with."""
        return Causal()

    def encode(self, vlm: PreTrainedModel, inputs: Inputs) -> EncodedMedia:
        """Images through tower and projector, by the architecture's own `get_image_features`."""
        seen: list[Tensor] = []
        hook = self.projector(vlm).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            output = inner(vlm).get_image_features(**inputs, return_dict=True)
        finally:
            hook.remove()
        parts = list(output.pooler_output)
        return EncodedMedia(
            torch.cat(parts), tuple(map(len, parts)), seen[0], lambda projected: self.arrange(vlm, projected, inputs)
        )

    def arrange(self, vlm: PreTrainedModel, projected: Tensor, inputs: Inputs) -> Tensor:
        """`[T, D]` of what the projector gave, as `get_image_features` lays it out."""
        return projected.flatten(0, -2)

    def blank(self, vlm: PreTrainedModel) -> dict[str, Tensor]:
        """The inputs of one image without content."""
        size = vlm.config.vision_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, 3, height, width)}

    def positions(
        self, vlm: PreTrainedModel, input_ids: Tensor, live: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        """Rotary positions `[B, S]` and, where they have three axes, the grid `[B, S, 3]` that is added to them."""
        return (live.cumsum(1) - 1) * live, None

    def answers(self, inputs: Inputs) -> Tensor | None:
        """bool `[B, S]`: what the model is taught to say, where the processor's own output tells it."""
        return None


def inner(vlm: PreTrainedModel) -> Any:
    """The model without its language-modelling head."""
    return vlm.model
