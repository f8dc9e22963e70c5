"""PaliGemma and Gemma 3: image tokens see each other in both directions.

Papers: PaliGemma, arXiv 2407.07726; Gemma 3, arXiv 2503.19786.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from mmfuse.fusion import Fusion, PrefixLM
from mmfuse.fusion.media_blocks import MediaBlocks
from mmfuse.models.adopt.base import Adapter, Inputs


class PaliGemma(Adapter):
    """PaliGemma: a prefix of image and prompt, seen in both directions; positions count from 1.

    `token_type_ids` tells what is suffix (1), which is the answer.
    """

    token_inputs = ("token_type_ids", "mm_token_type_ids")
    native_settings = ("use_bidirectional_attention",)

    def native(self, vlm: PreTrainedModel) -> Fusion:
        return PrefixLM()

    def positions(
        self, vlm: PreTrainedModel, input_ids: Tensor, live: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        return live.cumsum(1) * live, None

    def answers(self, inputs: Inputs) -> Tensor | None:
        types = inputs.get("token_type_ids")
        return None if types is None else types == 1


class Gemma3(Adapter):
    """Gemma 3: causal text, and images whose tokens see their whole image."""

    token_inputs = ("token_type_ids", "mm_token_type_ids")

    def native(self, vlm: PreTrainedModel) -> Fusion:
        return MediaBlocks()
