"""Split-KV decoding against the last rows of a prefill, and the backend as `attend` knows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from mmfuse.fusion import FUSIONS
from mmfuse.kernels import BackendError, Call, Visibility, attend
from mmfuse.kernels.plan import BlockPlan
from mmfuse.kernels.triton import refusal
from mmfuse.kernels.triton.launch import decode_splits, launch_of
from mmfuse.kernels.triton.operator import masked_attention
from mmfuse.sequence import TokenMap

pytestmark = pytest.mark.usefixtures("poisoned")


def tokens_of(length: int) -> TokenMap:
    return TokenMap.from_layout([("text", 20), ("image", length - 25), ("answer", 5)])


def mutual(lengths: list[int]) -> Visibility:
    return FUSIONS["mma"]().visibility(TokenMap.batch([tokens_of(length) for length in lengths], side="left"))


@pytest.mark.parametrize(("with_mass", "blocks"), [(False, (64, 64)), (True, (64, 128))])
@pytest.mark.parametrize(
    ("heads", "key_heads", "queries", "head_dim"), [(4, 4, 1, 64), (6, 2, 5, 80), (8, 1, 3, 96), (2, 2, 17, 16)]
)
def test_decoding_gives_the_last_rows_of_a_prefill(
    heads: int, key_heads: int, queries: int, head_dim: int, with_mass: bool, blocks: tuple[int, int],
    by_force: Callable[..., BlockPlan],
) -> None:  # fmt: skip
    """The second sample has keys only in its last blocks; the third sees nothing in its last row."""
    visibility = mutual([222, 60, 140])
    seen = visibility.dense().clone()
    seen[2, -1] = False
    batch, length = seen.shape[:2]
    q = torch.randn(batch, heads, length, head_dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, key_heads, length, head_dim, dtype=torch.float64)
    mass = torch.randn(batch, length, dtype=torch.float64) if with_mass else None
    expected = masked_attention(q, k, v, by_force(seen, *blocks), scale=0.3, mass=mass)[:2]
    last = slice(-queries, None)
    plan, mass = by_force(seen[:, last], *blocks), None if mass is None else mass[:, last]
    assert (
        heads // key_heads * length > launch_of("decode", head_dim, 8, amd=False).rows >= heads // key_heads * queries
    )
    mine = masked_attention(q[:, :, last], k, v, plan, scale=0.3, mass=mass)[:2]
    for x, y in zip(mine, expected, strict=True):
        torch.testing.assert_close(x, y[:, :, last], rtol=1e-12, atol=1e-12)
    if mass is None:
        assert torch.equal(mine[0][2, :, -1], torch.zeros(heads, head_dim, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_in_16_bits_errs_no_more_than_twice_plain_torch(dtype: torch.dtype) -> None:
    visibility = mutual([300, 200]).rows(298)
    q = torch.randn(2, 8, 2, 64).to(dtype)
    k, v = torch.randn(2, 2, 2, 300, 64).to(dtype)
    truth = attend(q.double(), k.double(), v.double(), visibility, backend="reference")
    errors = [
        float((attend(q, k, v, visibility, backend=backend).double() - truth).norm())
        for backend in ("triton", "reference")
    ]
    assert errors[0] <= 2 * errors[1]


def test_keys_are_split_until_a_gpu_is_full() -> None:
    assert decode_splits(programs=1, keys=64, block_k=64) == 1
    assert decode_splits(programs=1, keys=64 * 100, block_k=64) == 128
    assert decode_splits(programs=64, keys=64 * 100, block_k=64) == 4
    assert decode_splits(programs=512, keys=64 * 100, block_k=64) == 1


# The backend


def test_plans_by_force_hold_the_masks(by_force: Callable[..., BlockPlan]) -> None:
    seen = torch.rand(2, 130, 200) < 0.5
    seen[:, :64, :128], seen[:, 64:, 128:] = True, False
    for plan in (by_force(seen), by_force(seen, 128, 64), by_force(seen, 64, 128)):
        assert torch.equal(plan.dense(), seen)
        assert torch.equal(plan.dense(by_key=True), seen)


@pytest.mark.parametrize("fusion", ["mma", "naavit"])
def test_the_planners_plan_serves_as_well_as_one_by_force(fusion: str, by_force: Callable[..., BlockPlan]) -> None:
    visibility = FUSIONS[fusion]().visibility(TokenMap.batch([*map(tokens_of, (140, 70))], side="right"))
    leaves = [torch.randn(2, 2, 140, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = attend(*leaves, visibility, scale=0.3, backend="triton")
    expected, _, _ = masked_attention(*leaves, by_force(visibility.dense()), scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_the_backend_refuses_what_it_cannot_do() -> None:
    visibility = mutual([70])
    wide = [torch.randn(1, 2, 70, 272) for _ in range(3)]
    with pytest.raises(BackendError, match="'triton' refuses: it takes head dims up to 256, got 272"):
        attend(*wide, visibility, scale=1.0, backend="triton")
    assert refusal(visibility, Call(heads=2, width=16, dtype=torch.float8_e4m3fn)) == (
        "it takes float16, bfloat16, float32, float64, got torch.float8_e4m3fn"
    )


WITHOUT_INTERPRETER = """
import sys
import torch
import mmfuse.kernels
from mmfuse.kernels import BACKENDS, Call
assert "triton" not in sys.modules, "imported before it is needed"
print(BACKENDS["triton"].refusal(None, Call(heads=2, width=16)))
"""


def test_tensors_on_the_cpu_are_refused_outside_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "it runs on a GPU, and these tensors are on the CPU (for tests, TRITON_INTERPRET=1 runs it there, slowly)"
    )
