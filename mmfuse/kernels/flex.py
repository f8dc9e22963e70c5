"""The backends `flex` and `flex_flash`: torch's FlexAttention on the block mask that our planner makes.

On a GPU the kernel is compiled. On the CPU it is run as it is: compiling takes seconds for every new mask, and there is
no backward pass on the CPU either way, so it is a check of the mask there and not a fast path.

`flex_flash` asks FlexAttention for the kernels of FlashAttention 4 (`BACKEND="FLASH"`), which torch calls experimental.
No GPU has run it here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mmfuse.kernels.call import Call
from mmfuse.kernels.plan import BlockPlan, TileLists, owner_of, plan_blocks
from mmfuse.kernels.visibility import Visibility, comparisons

#: FlexAttention's own default.
BLOCK = 128

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def refusal(visibility: Visibility, call: Call) -> str | None:
    """Why FlexAttention cannot do this, or None."""
    if call.device == "cpu" and call.differentiable:
        return "FlexAttention has no backward pass on the CPU, and an input requires a gradient"
    return None


def flash_refusal(visibility: Visibility, call: Call) -> str | None:
    """Why FlashAttention 4 cannot do this, or None."""
    if call.device != "cuda" or torch.version.hip is not None:
        return f"FlashAttention 4 runs on NVIDIA GPUs, this is {call.device}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention 4 takes float16 and bfloat16, got {str(call.dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return "FlashAttention 4 needs a GPU from Hopper on"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "it needs the package flash-attn-4, which is not installed here"
    return None


def flex(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None) -> Tensor:
    """Masked attention by FlexAttention; rows that see nothing give 0."""
    return _run(q, k, v, visibility, scale, mass, "AUTO")


def flex_flash(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None) -> Tensor:
    """The same by FlexAttention's FlashAttention 4."""
    return _run(q, k, v, visibility, scale, mass, "FLASH")


def _run(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, mass: Tensor | None, kernels: str
) -> Tensor:
    mask = visibility.remember("block mask", lambda: block_mask(visibility))
    run: Any = torch.compile(flex_attention)
    if q.device.type == "cpu":
        # torch refuses inputs that require a gradient even where none is recorded.
        run, q, k, v = flex_attention, q.detach(), k.detach(), v.detach()
    with warnings.catch_warnings():
        # That it is not compiled on the CPU is meant so.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, aux = run(
            *(q, k, v),
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options={"BACKEND": kernels},
        )
    if mass is None:
        return out
    # One more key of value 0 takes its share of the softmax. A row with neither keys nor mass is 0 - 0.
    share = torch.sigmoid(aux.lse - mass.unsqueeze(1)).nan_to_num(0.0)
    return out * share.unsqueeze(-1).to(out.dtype)


def block_mask(visibility: Visibility, block_q: int = BLOCK, block_k: int = BLOCK) -> BlockMask:
    """The BlockMask that torch's `create_block_mask` makes of this mask, from our plan and without an N×N tensor."""
    plan = plan_blocks(visibility, block_q, block_k)
    partial, full = _grids(plan, plan.by_query)
    number, index = _ordered(partial)
    full_number, full_index = _ordered(full)
    return BlockMask.from_kv_blocks(
        number,
        index,
        full_number,
        full_index,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod(visibility),
        seq_lengths=(plan.queries, plan.keys),
    )


def _grids(plan: BlockPlan, lists: TileLists) -> tuple[Tensor, Tensor]:
    """int32 `[B, 1, nq, nk]` of 0 and 1: which tiles are partial, and which are full."""
    grids = []
    for offsets, blocks in (
        (lists.partial_offsets, lists.partial_blocks),
        (lists.full_offsets, lists.full_blocks),
    ):
        grid = torch.zeros(plan.batch * plan.query_blocks, plan.key_blocks, dtype=torch.int32, device=offsets.device)
        grid[owner_of(offsets), blocks.long()] = 1
        grids.append(grid.unflatten(0, (plan.batch, 1, plan.query_blocks)))
    return grids[0], grids[1]


def _ordered(grid: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row of `grid` has, and their columns in front of all others."""
    index = grid.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return grid.sum(-1).to(torch.int32), index.contiguous()


def mask_mod(visibility: Visibility) -> MaskMod:
    """The rules as a function of (sample, head, query, key), as FlexAttention asks for them."""
    queries, keys, window = visibility.queries, visibility.keys, visibility.window
    count = len(visibility.names)
    terms = []
    for conjunction, pairs in visibility.pairs_by_conjunction().items():
        table = torch.zeros(count, count, dtype=torch.bool)
        for pair in pairs:
            table[pair] = True
        compared = comparisons(conjunction)
        sides = [(each, getattr(queries, each.mine), getattr(keys, each.theirs)) for each in compared]
        terms.append((table.to(queries.document.device), sides))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        document = queries.document[b, q]
        same = (document == keys.document[b, k]) & (document >= 0)
        seen = same & ~same
        for table, sides in terms:
            held = table[queries.cls[b, q], keys.cls[b, k]]
            for each, mine, theirs in sides:
                held = held & each(mine[b, q], theirs[b, k])
            seen = seen | held
        if window is not None:
            same = same & ((queries.slot[b, q] - keys.slot[b, k]).abs() < window)
        return seen & same

    return sees
