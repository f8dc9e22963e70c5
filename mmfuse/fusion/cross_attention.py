"""Gated cross-attention (Flamingo): media stay outside of the decoder, which looks at them between its layers.

    columns: S system, I image, Q question, J another image, P its question, A answer
    # the decoder's own attention, x cross-attention in front of every n-th layer
        S I I Q J J P A
      S #
      I
      I
      Q # x x #
      J
      J
      P #     # x x #
      A #     # x x # #

Paper: Alayrac et al., Flamingo, arXiv 2204.14198, section 2.2; block as in OpenFlamingo, arXiv 2308.01390:
`x + tanh(a)·CA(LN x, media)`, then `x + tanh(f)·FF(x)`, with both gates 0 at first, so training starts from the
text-only decoder. Keys and values of media have no norm and no positions; text looks at the medium right before it
alone (`reach="all"`: at every medium before it). The usual connector is `perceiver`.

The base of this strategy is the text-only decoder: its sequence, positions and cache are those of the text by itself.

Deliberate differences from the official code: keys and values of media are cached in decoding (there they are computed
anew at every step); the last resampler layer maps to the decoder's width, so media come in that width; no placeholder
stays in the text; under `reach="all"` text in front of every medium sees none (there it sees all, later ones too).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmfuse.errors import ConfigError, unknown
from mmfuse.fusion.aside import Reach, aside_visibility
from mmfuse.fusion.base import Fusion, Look, MediaPath, NewConnector
from mmfuse.fusion.flops import causal_flops, cross_attention_flops
from mmfuse.fusion.shape import DecoderShape
from mmfuse.kernels import Visibility
from mmfuse.sequence import TokenMap


class GatedCrossAttention(Fusion):
    """Gated cross-attention blocks in front of every `every`-th layer.

    Args:
        layers: the decoder layers with a block; None means every `every`-th. With `layers=[]` media are not read.
        every: a block stands in front of layers `every - 1`, `2·every - 1`, …; has no effect where `layers` is given.
        heads: of a block.
        head_dim: of a block; its inner width is `heads · head_dim`, whatever the decoder's.
        reach: which media a text token sees.
        feed_forward_mult: width of a block's feed-forward network as a multiple of the decoder's.

    Raises:
        ConfigError: `every` below 1, or an unknown `reach`.
    """

    media_path = MediaPath.ASIDE

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        every: int = 1,
        heads: int = 8,
        head_dim: int = 64,
        reach: Reach = "latest",
        feed_forward_mult: int = 4,
    ) -> None:
        super().__init__(layers)
        if every < 1:
            raise ConfigError(f"cross_attention: every must be at least 1, got {every}")
        if reach not in ("latest", "all"):
            raise ConfigError(unknown("reach of cross_attention", reach, ("latest", "all")))
        self.every, self.heads, self.head_dim = every, heads, head_dim
        self.reach, self.feed_forward_mult = reach, feed_forward_mult
        self.blocks = nn.ModuleDict()

    def build(self, shape: DecoderShape, new_connector: NewConnector, modalities: Sequence[str]) -> None:
        for layer in range(shape.layers):
            if self.changes(layer):
                block = CrossAttentionBlock(shape.hidden_size, self.heads, self.head_dim, self.feed_forward_mult)
                self.blocks[str(layer)] = block

    def changes(self, layer: int) -> bool:
        return super().changes(layer) and (self.layers is not None or (layer + 1) % self.every == 0)

    def layer_flops(self, shape: DecoderShape, text: int, visual: int) -> int:
        block = cross_attention_flops(
            shape,
            text,
            visual,
            media_width=shape.hidden_size,
            inner=self.heads * self.head_dim,
            ff_mult=self.feed_forward_mult,
        )
        return causal_flops(shape, text, 0) + block

    def visibility(self, tokens: TokenMap) -> Visibility:
        return aside_visibility(tokens, self.reach)

    def media_keys(self, layer: int, media: Tensor) -> tuple[Tensor, Tensor]:
        return self._block(layer).keys_and_values(media)

    def cross_attend(self, layer: int, hidden: Tensor, look: Look) -> Tensor:
        out: Tensor = self._block(layer)(hidden, look)
        return out

    def _block(self, layer: int) -> CrossAttentionBlock:
        return cast(CrossAttentionBlock, self.blocks[str(layer)])


class CrossAttentionBlock(nn.Module):
    """One gated block: attention to media, then a feed-forward network, both behind a tanh gate.

    Args:
        width: of the decoder, `D`.
        heads: attention heads.
        head_dim: width of a head.
        feed_forward_mult: width of the feed-forward network as a multiple of `width`.
    """

    def __init__(self, width: int, heads: int, head_dim: int, feed_forward_mult: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, feed_forward_mult * width, bias=False),
            nn.GELU(),
            nn.Linear(feed_forward_mult * width, width, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Draw the weights anew and close the gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.attention_gate)
        nn.init.zeros_(self.feed_forward_gate)

    def keys_and_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, heads, M, head_dim]` twice, of `media [B, M, D]`."""
        keys, values = self.to_kv(media).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, hidden: Tensor, look: Look) -> Tensor:
        seen = look(self._split(self.to_q(self.norm(hidden)))).transpose(1, 2).flatten(2)
        hidden = hidden + self.attention_gate.tanh() * self.to_out(seen)
        out: Tensor = hidden + self.feed_forward_gate.tanh() * self.feed_forward(hidden)
        return out

    def _split(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.heads, -1)).transpose(1, 2)
