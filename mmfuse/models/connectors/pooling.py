"""Connectors that shorten the patch grid and then project: pixel shuffle and average pooling."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmfuse.errors import ConfigError
from mmfuse.models.connectors.base import Connector, projection


class PixelShuffleConnector(Connector):
    """Space to depth: each r x r block of patches becomes one token of r² times the width, then an MLP.

    As in InternVL 1.5 (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637). Within a token the features of a
    block's patches stand in row-major order, as in Idefics3. Deliberate difference: InternVL has a LayerNorm
    before the MLP, Idefics3 one Linear without bias instead of it.

    Args:
        in_features: width of the encoder's features.
        out_features: width of the decoder.
        grid: (rows, columns) of patches.
        factor: r; both sides of the grid must be multiples of it.
        depth: number of Linear layers.

    Raises:
        ConfigError: if the grid cannot be cut into blocks.
    """

    name = "pixel_shuffle"

    def __init__(
        self, in_features: int, out_features: int, grid: tuple[int, int], factor: int = 2, depth: int = 2
    ) -> None:
        super().__init__(in_features, out_features, grid)
        if factor < 1 or grid[0] % factor or grid[1] % factor:
            raise ConfigError(f"factor={factor} does not divide the patch grid {grid[0]} x {grid[1]}")
        self.factor = factor
        self.projection = projection(factor * factor * in_features, out_features, depth)

    def forward(self, features_NVD: torch.Tensor) -> torch.Tensor:
        self.check_grid(features_NVD.shape[1])
        tokens_NVD: torch.Tensor = self.projection(space_to_depth(features_NVD, self.grid, self.factor))
        return tokens_NVD

    def num_tokens(self, v: int) -> int:
        self.check_grid(v)
        return v // self.factor**2


class AvgPoolConnector(Connector):
    """Average pooling of the patch grid to `output_size`, then an MLP.

    Pooling is adaptive (DeCo, arXiv 2405.20985): where the output divides the grid it is the ordinary strided
    one, elsewhere neighbouring windows overlap by one row or column.

    Args:
        in_features: width of the encoder's features.
        out_features: width of the decoder.
        grid: (rows, columns) of patches.
        output_size: rows and columns after pooling, one number or two.
        depth: number of Linear layers.

    Raises:
        ConfigError: if the output is empty or finer than the grid.
    """

    name = "avg_pool"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: tuple[int, int],
        output_size: int | list[int] | tuple[int, int],
        depth: int = 2,
    ) -> None:
        super().__init__(in_features, out_features, grid)
        sides = [output_size, output_size] if isinstance(output_size, int) else list(output_size)
        if len(sides) != 2 or not all(1 <= side <= limit for side, limit in zip(sides, grid, strict=True)):
            raise ConfigError(f"output_size={output_size} does not fit into the patch grid {grid[0]} x {grid[1]}")
        self.output_size = (sides[0], sides[1])
        self.projection = projection(in_features, out_features, depth)

    def forward(self, features_NVD: torch.Tensor) -> torch.Tensor:
        self.check_grid(features_NVD.shape[1])
        maps_NDyx = features_NVD.transpose(1, 2).unflatten(2, self.grid)
        pooled_NDV = F.adaptive_avg_pool2d(maps_NDyx, self.output_size).flatten(2)
        tokens_NVD: torch.Tensor = self.projection(pooled_NDV.transpose(1, 2))
        return tokens_NVD

    def num_tokens(self, v: int) -> int:
        self.check_grid(v)
        return self.output_size[0] * self.output_size[1]


def space_to_depth(features_NVD: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """`[N, rows * columns, D]` to `[N, rows * columns / factor², factor² * D]`, row-major throughout."""
    x = features_NVD.unflatten(1, (grid[0] // factor, factor, grid[1] // factor, factor))
    return x.transpose(2, 3).flatten(3, 5).flatten(1, 2)
