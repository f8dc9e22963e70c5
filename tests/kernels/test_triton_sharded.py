"""The operators under FSDP: two processes hold half of the weights each, and gradients are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmfuse.kernels import plan_blocks
from mmfuse.kernels.triton.operator import masked_attention
from mmfuse.training.kernels import example

LENGTH, WIDTH, HEADS = 70, 32, 2


class Block(nn.Module):
    """A projection, attention under the mask of MMA by the Triton kernels, and another projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        # Made once for a batch, and outside of what is compiled.
        self.plan = plan_blocks(example("mma", LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out, _, _ = masked_attention(q, k, v, self.plan, scale=0.25)
        return self.out(out.transpose(1, 2).flatten(2))


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def inputs(rank: int) -> Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(rank))


def work(rank: int, file: str, compiled: bool) -> None:
    init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        model = built()
        mesh = init_device_mesh("cpu", (2,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(inputs(rank)).square().sum().backward()
        found = {}
        for name, weight in model.named_parameters():
            assert isinstance(weight.grad, DTensor)
            found[name] = weight.grad.full_tensor()
        if rank == 0:
            torch.save(found, f"{file}.gradients")
    finally:
        destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_sharded_weights_are_those_of_whole_ones(compiled: bool, tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path / "store"), compiled), nprocs=2)
    found = torch.load(tmp_path / "store.gradients", weights_only=True)
    whole = built()
    for rank in range(2):
        (whole(inputs(rank)).square().sum() / 2).backward()
    assert found.keys() == dict(whole.named_parameters()).keys()
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-4)
