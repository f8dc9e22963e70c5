"""The perceiver resampler: a fixed number of learned latents reads any number of visual tokens.

Flamingo (arXiv 2204.14198, §2.1 and appendix A.1.1); AKI (arXiv 2503.02597) uses it with 144 latents and a
Linear to the decoder's width at the end. Each layer:

    latents += Attention(q = LN(latents), kv = [LN(features); LN(latents)])
    latents += Linear(GELU(Linear(LN(latents))))

Attention and feed-forward have no biases, the layer norms and the last Linear have. Deliberate difference
from Flamingo: no embeddings of frame or time; every image stands alone, as in AKI.

Shape suffixes: N images, V features, Q latents, H heads, D width, E head width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mmfuse.errors import ConfigError
from mmfuse.models.connectors.base import Connector


class PerceiverConnector(Connector):
    """Perceiver resampler with AKI's defaults: 81.6 M parameters from 1152 to 3072 features.

    Initialisation: latents from N(0, 1), the rest as in `Connector`.

    Args:
        in_features: width of the encoder's features and of the latents.
        out_features: width of the decoder.
        grid: see `Connector`; any number of tokens will do.
        num_latents: how many visual tokens the decoder gets.
        depth: number of layers.
        heads: attention heads.
        dim_head: width of one head.
        ff_mult: hidden width of the feed-forward, in multiples of `in_features`.

    Raises:
        ConfigError: if one of the sizes is less than 1.
    """

    name = "perceiver"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: tuple[int, int],
        num_latents: int = 144,
        depth: int = 6,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
    ) -> None:
        super().__init__(in_features, out_features, grid)
        sizes = {"num_latents": num_latents, "depth": depth, "heads": heads, "dim_head": dim_head}
        for name, size in {**sizes, "ff_mult": ff_mult}.items():
            if size < 1:
                raise ConfigError(f"connector 'perceiver': {name}={size} must be at least 1")
        self.latents = nn.Parameter(torch.randn(num_latents, in_features))
        self.layers = nn.ModuleList(_ResamplerLayer(in_features, heads, dim_head, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)

    def forward(self, features_NVD: torch.Tensor) -> torch.Tensor:
        latents_NQD = self.latents.to(features_NVD.dtype).expand(features_NVD.shape[0], -1, -1)
        for layer in self.layers:
            latents_NQD = layer(latents_NQD, features_NVD)
        tokens_NQD: torch.Tensor = self.projection(self.norm(latents_NQD))
        return tokens_NQD

    def num_tokens(self, v: int) -> int:
        return self.latents.shape[0]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.latents)


class _ResamplerLayer(nn.Module):
    def __init__(self, width: int, heads: int, dim_head: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, heads * dim_head, bias=False)
        self.kv_proj = nn.Linear(width, 2 * heads * dim_head, bias=False)
        self.o_proj = nn.Linear(heads * dim_head, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, ff_mult * width, bias=False),
            nn.GELU(),
            nn.Linear(ff_mult * width, width, bias=False),
        )

    def forward(self, latents_NQD: torch.Tensor, features_NVD: torch.Tensor) -> torch.Tensor:
        query_NQD = self.norm_latents(latents_NQD)
        context_NKD = torch.cat([self.norm_features(features_NVD), query_NQD], dim=1)
        q_NHQE = self._split(self.q_proj(query_NQD))
        k_NHKE, v_NHKE = (self._split(x) for x in self.kv_proj(context_NKD).chunk(2, dim=-1))
        mixed_NHQE = F.scaled_dot_product_attention(q_NHQE, k_NHKE, v_NHKE)
        latents_NQD = latents_NQD + self.o_proj(mixed_NHQE.transpose(1, 2).flatten(2))
        updated_NQD: torch.Tensor = latents_NQD + self.feed_forward(latents_NQD)
        return updated_NQD

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
