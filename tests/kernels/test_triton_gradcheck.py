"""The gradients of the Triton kernels against differences of their own output, without a reference in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfuse.fusion import FUSIONS
from mmfuse.kernels.plan import plan_blocks
from mmfuse.kernels.triton.operator import masked_attention
from mmfuse.sequence import TokenMap

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rule", ["causal", "prefix_lm", "mma", "naavit", "cross_attention"])
def test_gradients_are_derivatives(rule: str) -> None:
    """Two documents longer than a block, grouped queries, rows without keys, and the mass."""
    layouts = [[("text", 20), ("image", 30), ("text", 19), ("answer", 3)], [("text", 5), ("image", 9), ("answer", 4)]]
    tokens = TokenMap.batch([TokenMap.from_layout(layout) for layout in layouts], side="left")
    visibility = FUSIONS[rule]().visibility(tokens)
    plan = plan_blocks(visibility)
    batch, queries, keys = visibility.shape
    shapes = ((batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16), (batch, queries))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attention(q: Tensor, k: Tensor, v: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        return masked_attention(q, k, v, plan, scale=0.3, mass=mass)[:2]

    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True, eps=1e-5, atol=1e-6, rtol=1e-5)
