"""Connectors that treat every token alone: one Linear (LLaVA), or an MLP (LLaVA-1.5)."""

from __future__ import annotations

import torch

from mmfuse.models.connectors.base import Connector, projection


class MLPConnector(Connector):
    """Linear layers with GELU between them; depth 2 is LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744, §3.1).

    Args:
        in_features: width of the encoder's features.
        out_features: width of the decoder, and of the hidden layers.
        grid: see `Connector`; any number of tokens will do.
        depth: number of Linear layers.
    """

    name = "mlp"

    def __init__(self, in_features: int, out_features: int, grid: tuple[int, int], depth: int = 2) -> None:
        super().__init__(in_features, out_features, grid)
        self.projection = projection(in_features, out_features, depth)

    def forward(self, features_NVD: torch.Tensor) -> torch.Tensor:
        tokens_NVD: torch.Tensor = self.projection(features_NVD)
        return tokens_NVD


class LinearConnector(MLPConnector):
    """One Linear layer (LLaVA, arXiv 2304.08485, eq. 1)."""

    name = "linear"

    def __init__(self, in_features: int, out_features: int, grid: tuple[int, int]) -> None:
        super().__init__(in_features, out_features, grid, depth=1)
