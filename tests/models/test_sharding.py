"""Weights that are sharded layer by layer: every strategy must use a layer's weights where they are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmfuse.fusion import FUSIONS
from mmfuse.testing import tiny_batch, tiny_model

#: A plain model under every strategy, and an adopted one.
CASES = [*((name, "llama") for name in FUSIONS), ("mma", "llava"), ("saisa", "llava")]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("fusion", "family"), CASES)
@pytest.mark.usefixtures("one_rank")
def test_sharded_layers_give_the_same_loss_and_gradients(fusion: str, family: str, checkpointing: bool) -> None:
    plain, sharded = tiny_model(fusion, family).train(), tiny_model(fusion, family).train()
    if checkpointing:
        sharded.activation_checkpointing_enable()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.decoder.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    batch = tiny_batch(plain)
    loss, expected = sharded(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:  # LLaVA reads the tower's last layer but one
            assert "vision_tower" in name
            continue
        assert isinstance(mine.grad, DTensor), name
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("backend", "compiled"),
    [
        ("reference", False),
        ("sdpa", False),
        ("rectangles", False),
        ("triton", False),
        pytest.param("triton", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_backends_run_inside_sharded_layers(backend: str, compiled: bool) -> None:
    """Custom operators, too, also where torch traces them; `flex` has no backward pass on CPUs."""
    plain, sharded = tiny_model("mma").train(), tiny_model("mma").train()
    plain.config.attention_backend = "reference"
    sharded.config.attention_backend = backend
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.decoder.model.layers:
        if compiled:
            layer.compile(backend="aot_eager")
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    batch = tiny_batch(plain)
    loss, expected = sharded(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
