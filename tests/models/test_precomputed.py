"""Features that were computed beforehand: what the encoder passes on, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mmfuse.errors import ConfigError
from mmfuse.models.connectors import build_connector
from mmfuse.models.encoders import PrecomputedEncoder, build_encoder

SPEC = {"type": "precomputed", "hidden_size": 12, "num_tokens": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_passed_on(dtype: torch.dtype) -> None:
    encoder = build_encoder(SPEC)
    features = torch.randn(2, 6, 12, dtype=dtype)
    assert encoder(features) is features
    assert list(encoder.state_dict()) == []
    assert (encoder.hidden_size, encoder.num_tokens, encoder.input_shape) == (12, 6, (6, 12))


@pytest.mark.parametrize("grid", [None, [2, 3]])
def test_spec_builds_the_same_encoder(grid: list[int] | None) -> None:
    encoder = build_encoder(SPEC if grid is None else {**SPEC, "grid": grid})
    again = build_encoder(encoder.spec)
    assert again.spec == encoder.spec
    assert again.grid == encoder.grid == ((1, 6) if grid is None else (2, 3))


def test_connectors_that_pool_take_grids_and_sequences() -> None:
    features = torch.randn(2, 6, 12)
    for grid, pooled, tokens in (([2, 3], [1, 3], 3), (None, [1, 2], 2)):
        encoder = build_encoder({**SPEC, "grid": grid})
        connector = build_connector({"type": "avg_pool", "output_size": pooled}, 12, 32, encoder.grid)
        assert connector(encoder(features)).shape == (2, tokens, 32)


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 6, 13), (6, 12), (1, 2, 6, 12)])
def test_shape_errors_name_both_shapes(shape: tuple[int, ...]) -> None:
    message = f"features have shape {list(shape)}, the encoder takes [N, 6, 12]"
    with pytest.raises(ValueError, match=re.escape(message)):
        PrecomputedEncoder(12, 6)(torch.zeros(shape))


def test_integers_are_no_features() -> None:
    with pytest.raises(TypeError, match=r"features must be floating point, got torch\.int64"):
        PrecomputedEncoder(12, 6)(torch.zeros(1, 6, 12, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "encoder 'precomputed': hidden_size must be an integer of at least 1, got 0"),
        ({"num_tokens": "6"}, "encoder 'precomputed': num_tokens must be an integer of at least 1, got '6'"),
        ({"grid": [2, 2]}, "encoder 'precomputed': a grid of [2, 2] does not hold 6 tokens"),
        ({"grid": [-2, -3]}, "a grid of [-2, -3] does not hold 6 tokens"),
        ({"grid": [6]}, "a grid of [6] does not hold 6 tokens"),
        ({"tokens": 6}, "unknown key in encoder 'precomputed' 'tokens': did you mean 'num_tokens'?"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_encoder({**SPEC, **changes})
    with pytest.raises(ConfigError, match="encoder 'precomputed' needs num_tokens"):
        build_encoder({"type": "precomputed", "hidden_size": 12})
