"""Connectors against plain references written from their equations, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmfuse.errors import ConfigError
from mmfuse.models.connectors import PerceiverConnector, PixelShuffleConnector, build_connector
from mmfuse.models.connectors.pooling import space_to_depth

GRID = (4, 6)
PATCHES = GRID[0] * GRID[1]
SPECS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"type": "linear"}, PATCHES),
    "mlp": ({"type": "mlp"}, PATCHES),
    "mlp-3": ({"type": "mlp", "depth": 3}, PATCHES),
    "perceiver": ({"type": "perceiver", "num_latents": 5, "depth": 2, "heads": 2, "dim_head": 4, "ff_mult": 2}, 5),
    "pixel_shuffle": ({"type": "pixel_shuffle"}, PATCHES // 4),
    "avg_pool": ({"type": "avg_pool", "output_size": [2, 3]}, 6),
}
every_spec = pytest.mark.parametrize(("spec", "tokens"), SPECS.values(), ids=SPECS)


def build(spec: dict[str, Any], in_features: int = 12, out_features: int = 10, grid: tuple[int, int] = GRID) -> Any:
    """In float64, with random values also where a fresh norm or bias is an identity."""
    connector = build_connector(spec, in_features, out_features, grid).double()
    for parameter in connector.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return connector


def features(count: int = 2, tokens: int = PATCHES, width: int = 12) -> Tensor:
    return torch.randn(count, tokens, width, dtype=torch.float64)


# What every connector does


@every_spec
def test_shapes(spec: dict[str, Any], tokens: int):
    connector = build(spec)
    assert connector(features()).shape == (2, tokens, 10)
    assert connector.num_tokens(PATCHES) == tokens
    assert (connector.in_features, connector.out_features, connector.grid) == (12, 10, GRID)


@every_spec
def test_images_do_not_mix(spec: dict[str, Any], tokens: int):
    connector, x = build(spec), features(3)
    torch.testing.assert_close(connector(x), torch.cat([connector(image[None]) for image in x]))


@every_spec
def test_gradients_reach_every_parameter_and_the_features(spec: dict[str, Any], tokens: int):
    connector, x = build(spec), features().requires_grad_()
    connector(x).square().sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x.grad is not None and bool(x.grad.ne(0).any(-1).all())


@every_spec
def test_meta_device_and_fresh_parameters(spec: dict[str, Any], tokens: int):
    with torch.device("meta"):
        connector = build_connector(spec, 12, 10, GRID)
    assert all(p.is_meta for p in connector.parameters())
    connector.to_empty(device="cpu")
    for parameter in connector.parameters():
        parameter.data.fill_(torch.nan)
    connector.reset_parameters()
    fresh = build_connector(spec, 12, 10, GRID)
    for (name, parameter), (_, expected) in zip(connector.named_parameters(), fresh.named_parameters(), strict=True):
        assert parameter.isfinite().all(), name
        if expected.std() == 0:
            assert torch.equal(parameter, expected), name
        else:
            assert 0.5 < parameter.std() / expected.std() < 2, name


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
@pytest.mark.parametrize("name", ["linear", "mlp", "perceiver"])
def test_connectors_without_a_grid_take_any_number_of_tokens(name: str, grid: tuple[int, int]):
    connector = build(SPECS[name][0], grid=grid)
    for count in (1, 7):
        assert connector(features(tokens=count)).shape[1] == connector.num_tokens(count)


@pytest.mark.parametrize("name", ["pixel_shuffle", "avg_pool"])
def test_tokens_that_do_not_fill_the_grid_are_refused(name: str):
    connector = build(SPECS[name][0])
    message = "got 25 tokens but its grid of 4 x 6 holds 24; it needs an encoder with tokens='patches'"
    with pytest.raises(ValueError, match=message):
        connector(features(tokens=PATCHES + 1))
    with pytest.raises(ValueError, match=message):
        connector.num_tokens(PATCHES + 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "a connector spec needs `type`. Known: avg_pool, linear, mlp, perceiver, pixel_shuffle"),
        ({"type": "preceiver"}, "unknown connector 'preceiver': did you mean 'perceiver'?"),
        ({"type": "linear", "depth": 2}, "unknown key in connector 'linear' 'depth'"),
        ({"type": "mlp", "detph": 2}, "did you mean 'depth'?"),
        ({"type": "mlp", "in_features": 8}, "unknown key in connector 'mlp' 'in_features'"),
        ({"type": "mlp", "depth": 0}, "depth=0: a projection has at least 1 layer"),
        ({"type": "perceiver", "num_latents": 0}, "num_latents=0 must be at least 1"),
        ({"type": "perceiver", "ff_mult": 0}, "ff_mult=0 must be at least 1"),
        ({"type": "pixel_shuffle", "factor": 4}, "factor=4 does not divide the patch grid 4 x 6"),
        ({"type": "pixel_shuffle", "factor": 0}, "factor=0 does not divide the patch grid 4 x 6"),
        ({"type": "avg_pool"}, "connector 'avg_pool' needs output_size"),
        ({"type": "avg_pool", "output_size": 5}, "output_size=5 does not fit into the patch grid 4 x 6"),
        ({"type": "avg_pool", "output_size": [0, 1]}, "output_size=[0, 1] does not fit"),
        ({"type": "avg_pool", "output_size": [1, 2, 3]}, "output_size=[1, 2, 3] does not fit"),
    ],
)
def test_mistakes_are_named(spec: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        build_connector(spec, 12, 10, GRID)
    assert message in str(error.value)


def test_widths_must_be_positive():
    with pytest.raises(ConfigError, match="connector 'linear': 0 to 10 features"):
        build_connector({"type": "linear"}, 0, 10, GRID)


# Linear and MLP


def test_linear_is_one_matrix():
    connector, x = build({"type": "linear"}), features()
    weight, bias = connector.parameters()
    torch.testing.assert_close(connector(x), x @ weight.T + bias)


def test_mlp_is_linear_gelu_linear():
    connector, x = build({"type": "mlp"}), features()
    w1, b1, w2, b2 = connector.parameters()
    hidden = x @ w1.T + b1
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(connector(x), hidden @ w2.T + b2)


# Pixel shuffle and pooling


@given(blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)), factor=st.integers(1, 3), width=st.integers(1, 3))
def test_pixel_shuffle_order(blocks: tuple[int, int], factor: int, width: int):
    """Token (Y, X) holds the features of patches (Y·r + dy, X·r + dx), dy before dx."""
    grid = (blocks[0] * factor, blocks[1] * factor)
    x = torch.arange(2.0 * grid[0] * grid[1] * width).reshape(2, -1, width)
    expected = []
    for image in x:
        tokens = []
        for block_y in range(blocks[0]):
            for block_x in range(blocks[1]):
                token = []
                for dy in range(factor):
                    for dx in range(factor):
                        patch = (block_y * factor + dy) * grid[1] + block_x * factor + dx
                        token += image[patch].tolist()
                tokens.append(token)
        expected.append(tokens)
    assert space_to_depth(x, grid, factor).tolist() == expected


def test_pixel_shuffle_projects_what_it_shuffled():
    connector, x = build({"type": "pixel_shuffle", "factor": 2, "depth": 1}), features()
    weight, bias = connector.parameters()
    torch.testing.assert_close(connector(x), space_to_depth(x, GRID, 2) @ weight.T + bias)
    assert isinstance(connector, PixelShuffleConnector)
    assert weight.shape == (10, 4 * 12)


@pytest.mark.parametrize("output", [(4, 6), (2, 3), (1, 1), (3, 4)])
def test_avg_pool_is_the_mean_of_windows(output: tuple[int, int]):
    connector, x = build({"type": "avg_pool", "output_size": list(output), "depth": 1}), features()
    weight, bias = connector.parameters()
    maps = x.reshape(2, *GRID, 12)
    pooled = []
    for row in range(output[0]):
        top, bottom = math.floor(row * GRID[0] / output[0]), math.ceil((row + 1) * GRID[0] / output[0])
        for column in range(output[1]):
            left, right = math.floor(column * GRID[1] / output[1]), math.ceil((column + 1) * GRID[1] / output[1])
            pooled.append(maps[:, top:bottom, left:right].mean((1, 2)))
    torch.testing.assert_close(connector(x), torch.stack(pooled, dim=1) @ weight.T + bias)


def test_avg_pool_with_one_number_is_square():
    assert build({"type": "avg_pool", "output_size": 2}).num_tokens(PATCHES) == 4


# The perceiver resampler


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias


def perceiver_reference(p: dict[str, Tensor], x: Tensor, depth: int, heads: int) -> Tensor:
    """Flamingo's resampler, one image and one head at a time."""
    outputs = []
    for image in x:
        latents = p["latents"]
        for i in range(depth):
            q = {name.removeprefix(f"layers.{i}."): value for name, value in p.items()}
            inner = layer_norm(latents, q["norm_latents.weight"], q["norm_latents.bias"])
            context = torch.cat([layer_norm(image, q["norm_features.weight"], q["norm_features.bias"]), inner])
            queries = inner @ q["q_proj.weight"].T
            keys, values = (context @ half.T for half in q["kv_proj.weight"].chunk(2))
            width = queries.shape[-1] // heads
            mixed = []
            for head in range(heads):
                at = slice(head * width, (head + 1) * width)
                scores = queries[:, at] @ keys[:, at].T / math.sqrt(width)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                mixed.append(weights @ values[:, at])
            latents = latents + torch.cat(mixed, dim=-1) @ q["o_proj.weight"].T
            hidden = layer_norm(latents, q["feed_forward.0.weight"], q["feed_forward.0.bias"])
            hidden = hidden @ q["feed_forward.1.weight"].T
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            latents = latents + hidden @ q["feed_forward.3.weight"].T
        latents = layer_norm(latents, p["norm.weight"], p["norm.bias"])
        outputs.append(latents @ p["projection.weight"].T + p["projection.bias"])
    return torch.stack(outputs)


@given(
    num_latents=st.integers(1, 4),
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim_head=st.integers(1, 4),
    ff_mult=st.integers(1, 3),
    tokens=st.integers(1, 6),
)
def test_perceiver_equals_its_equations(
    num_latents: int, depth: int, heads: int, dim_head: int, ff_mult: int, tokens: int
):
    options = {"num_latents": num_latents, "depth": depth, "heads": heads, "dim_head": dim_head, "ff_mult": ff_mult}
    connector = build({"type": "perceiver", **options}, in_features=6, out_features=5)
    x = features(tokens=tokens, width=6).requires_grad_()
    parameters = dict(connector.named_parameters())
    out, expected = connector(x), perceiver_reference(parameters, x, depth, heads)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    inputs = [x, *parameters.values()]
    probe = torch.randn_like(out)
    grads, expected_grads = (torch.autograd.grad((y * probe).sum(), inputs) for y in (out, expected))
    for name, grad, expected_grad in zip(["features", *parameters], grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_perceiver_in_float32_is_close_to_float64():
    connector, x = build(SPECS["perceiver"][0]), features()
    expected = connector(x)
    torch.testing.assert_close(connector.float()(x.float()).double(), expected, atol=1e-5, rtol=1e-5)


def test_perceiver_of_aki():
    """AKI-4B: 729 SigLIP features of width 1152 become 144 tokens of width 3072; 81.6 M parameters."""
    with torch.device("meta"):
        connector = build_connector({"type": "perceiver"}, 1152, 3072, (27, 27))
        assert connector(torch.empty(2, 729, 1152)).shape == (2, 144, 3072)
    inner, width, out, latents = 8 * 64, 1152, 3072, 144
    layer = 4 * width + width * inner + width * 2 * inner + inner * width + 2 * width + 2 * 4 * width * width
    expected = 6 * layer + latents * width + 2 * width + width * out + out
    assert sum(p.numel() for p in connector.parameters()) == expected
    assert round(expected / 1e6, 1) == 81.6
    assert connector.num_tokens(729) == 144


def test_latents_are_standard_normal():
    connector = PerceiverConnector(64, 8, GRID, num_latents=256, depth=1)
    assert abs(float(connector.latents.detach().mean())) < 0.05
    assert abs(float(connector.latents.detach().std()) - 1) < 0.05
