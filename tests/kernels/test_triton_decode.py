"""Split-KV decoding against the last rows of a prefill, and the backend as `attend` knows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse.errors import RunError
from mmfuse.fusion import FUSIONS
from mmfuse.kernels import Visibility, attend
from mmfuse.kernels.triton import BLOCKS, refusal
from mmfuse.kernels.triton.launch import decode_splits
from mmfuse.kernels.triton.lists import Lists, lists_of
from mmfuse.kernels.triton.operator import attention_decode, masked_attention
from mmfuse.sequence import TokenMap

pytestmark = pytest.mark.usefixtures("poisoned")


def causal(lengths: list[int]) -> Visibility:
    maps = [TokenMap.from_layout([("text", 20), ("image", n - 25), ("answer", 5)]) for n in lengths]
    return FUSIONS["mma"]().visibility(TokenMap.batch(maps, side="left"))


def decoded(q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, lists: Lists, blocks: tuple[int, int]) -> Any:
    log2 = None if mass is None else mass / torch.log(torch.tensor(2.0, dtype=mass.dtype))
    out, lse = attention_decode(q, k, v, log2, lists, *blocks, 0.3)
    return out, lse * torch.log(torch.tensor(2.0, dtype=lse.dtype))


@pytest.mark.parametrize("blocks", [(64, 64), (64, 128)])
@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize(
    ("heads", "key_heads", "queries", "head_dim"), [(4, 4, 1, 64), (6, 2, 5, 80), (8, 1, 3, 96), (2, 2, 17, 16)]
)
def test_decoding_gives_the_last_rows_of_a_prefill(
    heads: int, key_heads: int, queries: int, head_dim: int, with_mass: bool, blocks: tuple[int, int],
    by_force: Callable[..., Any],
) -> None:  # fmt: skip
    """The second sample has keys only in its last blocks; the third sees nothing in its last row."""
    visibility = causal([333, 60, 200])
    seen = visibility.dense().clone()
    seen[2, -1] = False
    batch, length = seen.shape[:2]
    q = torch.randn(batch, heads, length, head_dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, key_heads, length, head_dim, dtype=torch.float64)
    mass = torch.randn(batch, length, dtype=torch.float64) if with_mass else None
    whole = [Lists(**side) for side in by_force(seen, *blocks)]
    # A gradient is asked for, so this one is the prefill's kernel.
    expected = masked_attention(q.requires_grad_(), k, v, *whole, blocks, scale=0.3, mass=mass)
    last = slice(-queries, None)
    mine = decoded(
        q[:, :, last].detach(), k, v, None if mass is None else mass[:, last],
        Lists(**by_force(seen[:, last], *blocks)[0]), blocks,
    )  # fmt: skip
    for x, y in zip(mine, expected, strict=True):
        torch.testing.assert_close(x, y[:, :, last].detach(), rtol=1e-12, atol=1e-12)
    if mass is None:
        assert torch.equal(mine[0][2, :, -1], torch.zeros(heads, head_dim, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_in_16_bits_errs_no_more_than_twice_plain_torch(dtype: torch.dtype) -> None:
    visibility = causal([300, 200]).rows(298)
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


def test_lists_equal_those_by_force(by_force: Callable[..., Any]) -> None:
    seen = torch.rand(2, 130, 200) < 0.5
    seen[:, :64, :128], seen[:, 64:, 128:] = True, False
    for mine, theirs in zip(lists_of(seen, (64, 64)), by_force(seen), strict=True):
        assert torch.equal(mine.words[mine.tile.long()], theirs["words"])
        assert sorted(mine.order.tolist()) == sorted(theirs["order"].tolist())
        for name in ("full_start", "full", "partial_start", "partial"):
            assert torch.equal(getattr(mine, name), theirs[name])


def test_the_lists_of_a_visibility_are_made_once() -> None:
    visibility = causal([70])
    inputs = [torch.randn(1, 2, 70, 16) for _ in range(3)]
    first = attend(*inputs, visibility, backend="triton")
    made = visibility.once(("triton lists", BLOCKS), lambda: pytest.fail("made again"))
    assert torch.equal(attend(*inputs, visibility, backend="triton"), first)
    assert made is visibility.once(("triton lists", BLOCKS), lambda: None)


def test_the_backend_refuses_what_it_cannot_do() -> None:
    visibility = causal([70])
    wide = [torch.randn(1, 2, 70, 272) for _ in range(3)]
    with pytest.raises(RunError, match="'triton' takes head dims up to 256, got 272"):
        attend(*wide, visibility, backend="triton")
    assert refusal(torch.empty(1, 1, 1, 16, dtype=torch.float8_e4m3fn)) == (
        "takes float16, bfloat16, float32, float64, got torch.float8_e4m3fn"
    )


WITHOUT_INTERPRETER = """
import sys
import torch
import mmfuse.kernels
from mmfuse.kernels.triton import refusal
assert "triton" not in sys.modules, "imported before it is needed"
print(refusal(torch.empty(1, 1, 1, 16)))
"""


def test_tensors_on_the_cpu_are_refused_outside_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "runs on a GPU, and these tensors are on the CPU (for tests, TRITON_INTERPRET=1 runs it there, slowly)"
    )
