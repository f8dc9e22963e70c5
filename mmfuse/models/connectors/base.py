"""What every connector is: encoder features in, visual tokens of the decoder's width out.

Shape suffixes: N images, V visual tokens, D features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from mmfuse.errors import ConfigError


class Connector(nn.Module):
    """Maps features `[N, V, in_features]` to visual tokens `[N, V', out_features]`.

    Initialisation: torch's own for Linear (uniform in ±1/√fan_in) and LayerNorm, whatever else a subclass
    names. The model that owns a connector calls `reset_parameters()` from its `_init_weights`.

    Args:
        in_features: width of the encoder's features.
        out_features: width of the decoder.
        grid: (rows, columns) of the encoder's patches.
    """

    name: ClassVar[str]

    def __init__(self, in_features: int, out_features: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ConfigError(f"connector {self.name!r}: {in_features} to {out_features} features")
        self.in_features = in_features
        self.out_features = out_features
        self.grid = grid

    def forward(self, features_NVD: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def num_tokens(self, v: int) -> int:
        """How many visual tokens the decoder gets for `v` tokens of the encoder."""
        return v

    def reset_parameters(self) -> None:
        """Draw all parameters anew (inside transformers' loading: only those that were not loaded)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()

    def check_grid(self, v: int) -> None:
        """Raise `ValueError`, naming both counts, unless `v` tokens fill the grid."""
        rows, columns = self.grid
        if v != rows * columns:
            raise ValueError(
                f"connector {self.name!r} got {v} tokens but its grid of {rows} x {columns} holds "
                f"{rows * columns}; it needs an encoder with tokens='patches'"
            )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"


def projection(in_features: int, out_features: int, depth: int) -> nn.Sequential:
    """`depth` Linear layers with GELU between them; the first one changes the width.

    Raises:
        ConfigError: if `depth` is less than 1.
    """
    if depth < 1:
        raise ConfigError(f"depth={depth}: a projection has at least 1 layer")
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)
