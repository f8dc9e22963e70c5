"""Which heads react to an image: the vision-aware head divergence (VHD, arXiv 2412.13949).

For each head of each layer, the distance between its outputs at the last token with the image and without it. A head
that ignores the image has 0.

Deliberate differences: "without" is an image without structure in the same slots, so that positions stay; the distance
is Euclidean and is also given relative to the output's own length, because heads differ in scale.

Shapes: `L` layers, `H` heads, `Dh` head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.analysis.mode import evaluation_mode
from mmfuse.models import MultimodalLM


def head_outputs(model: MultimodalLM, batch: Mapping[str, Any]) -> Tensor:
    """What each head gives at the last token, before the output projection: float32 `[L, H, Dh]` on the CPU.

    Args:
        model: in any mode.
        batch: one sample without padding that ends with text, so that the last row of every layer is its last token.

    Raises:
        ValueError: more than one sample, or padding.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    if inputs["input_ids"].shape[0] != 1 or bool(inputs["tokens"].is_pad.any()):
        raise ValueError("outputs of heads are taken from one sample without padding")
    heads = model.config.text_config.num_attention_heads
    found: dict[int, Tensor] = {}
    with ExitStack() as stack, evaluation_mode(model), torch.inference_mode():
        for index, layer in enumerate(model.decoder.model.layers):

            def keep(module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                found[index] = args[0][0, -1].float().unflatten(-1, (heads, -1)).cpu()

            stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(keep).remove)
        model(**inputs, return_logits=False)
    return torch.stack([found[index] for index in sorted(found)])


def head_divergence(seen: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each head, `[L, H]`, and the same relative to the output with the image (0 where both are 0).

    Args:
        seen: `[L, H, Dh]` with the image.
        blank: the same without it.
    """
    apart, length = (seen - blank).norm(dim=-1), seen.norm(dim=-1)
    return apart, torch.where(apart > 0, apart / length.clamp(min=1e-12), 0.0)
