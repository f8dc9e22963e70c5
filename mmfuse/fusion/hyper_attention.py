"""Hyper attention (mPLUG-Owl3): in a few layers, keys of media join the softmax of the text's own attention.

    columns: S system, I image, Q question, A answer
    # attention in every layer, x in hyper layers alone
        S I I Q Q A
      S #
      I
      I
      Q # x x #
      Q # x x # #
      A # x x # # #

Paper: Ye et al., mPLUG-Owl3, arXiv 2408.04840, section 2.2, as in the version of November 2024 (241101): one softmax
over media and text, no gate. A hyper layer norms media with its own input norm and makes their keys and values with one
new projection (with bias); queries are the text's own. All tokens of a medium take one position, that of their place
in the text (MI-RoPE).

The base of this strategy is the text-only decoder: its sequence, positions and cache are those of the text by itself.

Deliberate differences from the official code: keys and values of media are cached in decoding; a medium's position is
that of the token behind it, since no placeholder stays in the text; in families that norm their keys (Qwen3, Gemma 3)
keys of media are normed too; a sliding-window layer forgets a medium when it forgets the text around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from mmfuse.fusion.aside import aside_visibility
from mmfuse.fusion.base import Fusion, MediaPath, NewConnector
from mmfuse.fusion.shape import DecoderShape
from mmfuse.kernels import Visibility
from mmfuse.sequence import TokenMap


class HyperAttention(Fusion):
    """Media join the attention of the hyper layers.

    Args:
        layers: the hyper layers, counted from 0; None means all. mPLUG-Owl3-7B-241101 has [6, 14, 22, 25]. With
            `layers=[]` media are not read.
    """

    media_path = MediaPath.ASIDE
    joins_attention = True

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers)
        self.projections = nn.ModuleDict()
        self._head_dim = 0

    def build(self, shape: DecoderShape, new_connector: NewConnector, modalities: Sequence[str]) -> None:
        self._head_dim = shape.head_dim
        for layer in range(shape.layers):
            if self.changes(layer):
                self.projections[str(layer)] = nn.Linear(shape.hidden_size, 2 * shape.kv_heads * shape.head_dim)

    def visibility(self, tokens: TokenMap) -> Visibility:
        return aside_visibility(tokens, "all")

    def media_keys(self, layer: int, media: Tensor) -> tuple[Tensor, Tensor]:
        both = cast(nn.Linear, self.projections[str(layer)])(media)
        keys, values = (half.unflatten(-1, (-1, self._head_dim)).transpose(1, 2) for half in both.chunk(2, dim=-1))
        return keys, values
