"""FlexAttention: our block mask is torch's own, made without an N×N tensor."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from mmfuse.fusion import FUSIONS
from mmfuse.kernels import BackendError, Call, attend, flex
from mmfuse.kernels.flex import block_mask, mask_mod
from mmfuse.sequence import TokenMap
from mmfuse.training.kernels import example

LAYOUT = [("text", 20), ("image", 140), ("text", 190), ("answer", 30), ("image", 64), ("text", 9), ("answer", 12)]
PARTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
TURNED = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


@pytest.mark.parametrize("name", FUSIONS)
def test_block_mask_is_the_one_that_torch_makes(name: str) -> None:
    maps = [TokenMap.from_layout(LAYOUT), TokenMap.from_layout(LAYOUT[:3])]
    for tokens in (TokenMap.pack(maps), TokenMap.batch(maps, side="left")):
        whole = FUSIONS[name]().visibility(tokens)
        for visibility in (whole, whole.rows(200).view(window=50, keys=len(tokens) - 30)):
            mine = block_mask(visibility)
            theirs = create_block_mask(mask_mod(visibility), *(visibility.shape[0], None), *visibility.shape[1:], "cpu")
            assert mine.seq_lengths == theirs.seq_lengths and mine.BLOCK_SIZE == theirs.BLOCK_SIZE
            for part in (*PARTS, *TURNED):
                assert torch.equal(getattr(mine, part), getattr(theirs, part)), part
            assert torch.equal(mine.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("mask", ["window_2d", "packed"])
def test_block_mask_of_windows_and_documents_is_the_one_that_torch_makes(mask: str) -> None:
    visibility = example(mask, 500, 2)
    mine = block_mask(visibility)
    theirs = create_block_mask(mask_mod(visibility), 2, None, 500, 500, "cpu")
    for part in (*PARTS, *TURNED):
        assert torch.equal(getattr(mine, part), getattr(theirs, part)), part
    seen = create_mask(mask_mod(visibility), 2, 1, 500, 500, "cpu")
    assert torch.equal(seen[:, 0], visibility.dense())


@pytest.mark.parametrize(
    ("call", "capability", "package", "told"),
    [
        (Call(2, 64, torch.bfloat16), (9, 0), True, "runs on NVIDIA GPUs, this is cpu"),
        (Call(2, 64, torch.float32, "cuda"), (9, 0), True, "takes float16 and bfloat16, got float32"),
        (Call(2, 64, torch.bfloat16, "cuda"), (8, 0), True, "needs a GPU from Hopper on"),
        (Call(2, 64, torch.bfloat16, "cuda"), None, True, "needs a GPU from Hopper on"),
        (Call(2, 64, torch.bfloat16, "cuda"), (9, 0), False, "needs the package flash-attn-4"),
        (Call(2, 64, torch.bfloat16, "cuda"), (10, 0), True, None),
    ],
)
def test_flash_attention_4_is_refused_by_name(
    call: Call, capability: tuple[int, int] | None, package: bool, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(flex, "find_spec", lambda name: name if package else None)
    refusal = flex.flash_refusal(example("mma", 8), call)
    assert refusal is None if told is None else told in str(refusal)


def test_gradients_on_the_cpu_are_refused() -> None:
    visibility = FUSIONS["mma"]().visibility(TokenMap.from_layout([("text", 3), ("image", 2)]))
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with pytest.raises(BackendError, match=r"no backward pass on the CPU.*can: reference, sdpa, rectangles"):
        attend(q, q, q, visibility, backend="flex")
    with torch.no_grad():
        out = attend(q, q, q, visibility, backend="flex")
    torch.testing.assert_close(out, attend(q, q, q, visibility, backend="reference"))
