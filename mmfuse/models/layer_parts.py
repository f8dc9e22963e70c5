"""The pieces of a Hugging Face decoder layer that strategies use apart: keys and values, the value path, the FFN.

They call the layer's own modules, so LoRA on them applies, and are tested against what the layer itself computes. One
class for each way in which families differ.

Shapes: `B` samples, `M` tokens, `D` hidden size, `H` heads, `Hkv` key heads, `Dh` head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]


class LayerParts:
    """A layer as in Llama, Mistral, Qwen2 and Gemma.

    Args:
        layer: a decoder layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.attention: Any = layer.self_attn

    def normalize(self, hidden: Tensor) -> Tensor:
        """What the layer's attention is given of `hidden [B, M, D]`."""
        normed: Tensor = self.layer.input_layernorm(hidden)
        return normed

    def keys_and_values(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys (with positions) and values `[B, Hkv, M, Dh]` that the layer makes of `hidden [B, M, D]`."""
        keys, values = self._project(self.normalize(hidden))
        return self.place(self._heads(keys), rotary), self._heads(values)

    def place(self, keys: Tensor, rotary: Rotary) -> Tensor:
        """What the layer does to its keys `[B, Hkv, M, Dh]` after projecting: their positions are put into them."""
        return rotate(keys, rotary)

    def attend_self(self, hidden: Tensor, values: Tensor) -> Tensor:
        """`hidden [B, M, D]` after an attention in which each token sees itself alone: `x + O(V(LN x))`.

        Args:
            hidden: what came into the layer.
            values: `[B, Hkv, M, Dh]`, as `keys_and_values` gives them for it.
        """
        groups = self.attention.num_key_value_groups
        mixed = values.repeat_interleave(groups, dim=1).transpose(1, 2).flatten(2)
        return self._add_attention(hidden, self.attention.o_proj(mixed))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """`hidden [B, M, D]` after the layer's feed-forward block, residual included."""
        out: Tensor = hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return out

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.k_proj(normed), self.attention.v_proj(normed)

    def _add_attention(self, hidden: Tensor, out: Tensor) -> Tensor:
        return hidden + out

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)


class NormedKeysParts(LayerParts):
    """Qwen3: keys are normed before they are rotated."""

    def place(self, keys: Tensor, rotary: Rotary) -> Tensor:
        return rotate(self.attention.k_norm(keys), rotary)


class SmolLM3Parts(LayerParts):
    """SmolLM3: some layers have no positions."""

    def place(self, keys: Tensor, rotary: Rotary) -> Tensor:
        return rotate(keys, rotary) if self.attention.use_rope else keys


class Phi3Parts(LayerParts):
    """Phi-3: q, k and v come from one matrix, and residuals pass dropouts."""

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.attention.qkv_proj
        width = self.attention.num_key_value_heads * self.attention.head_dim
        if type(fused) is nn.Linear and not fused._forward_hooks and not fused._forward_pre_hooks:
            # The rows that make queries are not wanted; an adapter around the matrix must run as a whole.
            both = F.linear(normed, fused.weight[-2 * width :])
        else:
            both = fused(normed)[..., -2 * width :]
        return both[..., :width], both[..., width:]

    def _add_attention(self, hidden: Tensor, out: Tensor) -> Tensor:
        return hidden + self.layer.resid_attn_dropout(out)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        out = self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return hidden + self.layer.resid_mlp_dropout(out)


class Gemma3Parts(NormedKeysParts):
    """Gemma 3: normed keys, and a norm behind the attention and around the feed-forward network."""

    def _add_attention(self, hidden: Tensor, out: Tensor) -> Tensor:
        return hidden + self.layer.post_attention_layernorm(out)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        out = self.layer.mlp(self.layer.pre_feedforward_layernorm(hidden))
        return hidden + self.layer.post_feedforward_layernorm(out)


PARTS: dict[str, type[LayerParts]] = {
    "llama": LayerParts,
    "qwen2": LayerParts,
    "qwen3": NormedKeysParts,
    "mistral": LayerParts,
    "phi3": Phi3Parts,
    "smollm3": SmolLM3Parts,
    "gemma3_text": Gemma3Parts,
    # Decoders of vision-language models alone.
    "gemma": LayerParts,
    "qwen2_vl_text": LayerParts,
    "qwen2_5_vl_text": LayerParts,
}


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of `x [B, H, M, Dh]`, halves rotated against each other.

    `rotary` is the cosine and sine `[B, M, R]`; with `R < Dh` the rest of each head is left alone (Phi-3).
    """
    cos, sin = (part.unsqueeze(1) for part in rotary)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
