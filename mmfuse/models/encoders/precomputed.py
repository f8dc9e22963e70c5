"""Features that another encoder has computed beforehand: of CLIP, Whisper, an EEG model, or anything else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmfuse.errors import ConfigError
from mmfuse.models.encoders.base import Encoder


class PrecomputedEncoder(Encoder):
    """Features of any modality, computed beforehand and passed on as they are; it has no parameters.

    Args:
        hidden_size: width D of the features.
        num_tokens: V, how many tokens each medium has.
        grid: rows and columns of the tokens in row-major order, for connectors that pool a grid; without it the
            tokens are a sequence, one row of V.

    Raises:
        ConfigError: a size below 1, or a grid that does not hold V tokens.
    """

    name = "precomputed"
    precomputed = True

    def __init__(self, hidden_size: int, num_tokens: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_tokens", num_tokens)):
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"encoder 'precomputed': {name} must be an integer of at least 1, got {size!r}")
        sides = (1, num_tokens) if grid is None else tuple(grid)
        if len(sides) != 2 or min(sides) < 1 or sides[0] * sides[1] != num_tokens:
            raise ConfigError(f"encoder 'precomputed': a grid of {list(sides)} does not hold {num_tokens} tokens")
        self.hidden_size = hidden_size
        self.num_tokens = num_tokens
        self.grid = (sides[0], sides[1])
        self.input_shape = (num_tokens, hidden_size)
        self.spec = {"type": self.name, "hidden_size": hidden_size, "num_tokens": num_tokens}
        if grid is not None:
            self.spec["grid"] = list(sides)

    def forward(self, features_NVD: Tensor) -> Tensor:
        """Pass features `[N, V, D]` of any float dtype on.

        Raises:
            ValueError: another shape, naming both.
            TypeError: no floating-point features.
        """
        if features_NVD.ndim != 3 or tuple(features_NVD.shape[1:]) != self.input_shape:
            raise ValueError(
                f"features have shape {list(features_NVD.shape)}, the encoder takes "
                f"[N, {self.num_tokens}, {self.hidden_size}]; set `num_tokens` and `hidden_size` where it is built"
            )
        if not features_NVD.is_floating_point():
            raise TypeError(f"features must be floating point, got {features_NVD.dtype}")
        return features_NVD

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_tokens={self.num_tokens}, grid={self.grid}"
