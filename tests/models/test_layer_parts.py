"""The pieces of a layer against what the layer itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from mmfuse.fusion.base import CLASSES, MEDIA, axis_of
from mmfuse.kernels import Condition, Visibility
from mmfuse.models.attention import Request
from mmfuse.models.config import DECODER_FAMILIES
from mmfuse.models.layer_parts import PARTS, LayerParts
from mmfuse.sequence import TokenMap
from mmfuse.testing import FAMILIES, tiny_model

LENGTH = 5
#: Adopted models whose decoders are of families that stand in no text model here.
ADOPTED = ("paligemma", "qwen2_vl", "qwen2_5_vl")


class Captured(Cache):
    """Keeps what a layer hands to its cache."""

    def __init__(self) -> None:
        super().__init__(layers=DynamicCache().layers)
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.held = key_states, value_states
        return key_states, value_states


def run_layer(base: Any, index: int, hidden: Tensor, visibility: Visibility) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layer's output and the keys and values that it caches."""
    cache, positions = Captured(), torch.arange(LENGTH).expand(2, -1) + 3
    rotary = rotary_of(base, index, hidden, positions)
    layer = base.layers[index]
    out = layer(
        hidden,
        attention_mask=Request(visibility),
        position_embeddings=rotary,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    assert cache.held is not None
    return out, cache.held


def rotary_of(base: Any, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if base.config.model_type == "gemma3_text":
        return base.rotary_emb(hidden, positions, base.config.layer_types[index])
    return base.rotary_emb(hidden, positions)


def self_only() -> Visibility:
    tokens = TokenMap.batch([TokenMap.from_layout([("image", LENGTH)])] * 2)
    return Visibility(axis_of(tokens), axis_of(tokens), {(MEDIA, MEDIA): (Condition.SELF,)}, CLASSES)


def check(base: Any) -> None:
    family = base.config.model_type
    hidden = torch.randn(2, LENGTH, 32)
    positions = torch.arange(LENGTH).expand(2, -1) + 3
    for index, layer in enumerate(base.layers):
        expected, (keys, values) = run_layer(base, index, hidden, self_only())
        parts = PARTS[family](layer)
        k, v = parts.keys_and_values(hidden, rotary_of(base, index, hidden, positions))
        torch.testing.assert_close(k, keys, rtol=0, atol=1e-6)
        torch.testing.assert_close(v, values, rtol=0, atol=1e-6)
        attended = parts.attend_self(hidden, v)
        torch.testing.assert_close(parts.feed_forward(attended), expected, rtol=0, atol=1e-5)


def test_every_family_has_its_parts() -> None:
    adopted = {tiny_model(family=family).config.text_config.model_type for family in ADOPTED}
    assert set(PARTS) == {*DECODER_FAMILIES, *adopted}
    assert all(issubclass(parts, LayerParts) for parts in PARTS.values())


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", [*FAMILIES, *ADOPTED])
def test_parts_are_what_the_layer_does(family: str, kv_heads: int) -> None:
    check(tiny_model(family=family, kv_heads=kv_heads).decoder.model)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *ADOPTED])
def test_adapters_apply(family: str) -> None:
    model = tiny_model(family=family)
    names = "qkv_proj" if family == "phi3" else "k_proj|v_proj"
    parts = PARTS[model.config.text_config.model_type]
    plain = parts(model.decoder.model.layers[0])
    hidden, positions = torch.randn(2, LENGTH, 32), torch.arange(LENGTH).expand(2, -1)
    rotary = rotary_of(model.decoder.model, 0, hidden, positions)
    before = plain.keys_and_values(hidden, rotary)
    get_peft_model(
        model, LoraConfig(r=4, target_modules=rf".*(decoder|language_model)\..*\.({names}|o_proj|down_proj)")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    after = parts(model.decoder.model.layers[0]).keys_and_values(hidden, rotary)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(before, after, strict=True))
    check(model.decoder.model)
