"""Mixed precision: attention runs in the lower precision, and results stay close to float32."""

from __future__ import annotations

import pytest
import torch

from mmfuse.fusion import FUSIONS
from mmfuse.testing import FAMILIES, tiny_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast_is_close_to_float32(family: str) -> None:
    model = tiny_model("mma", family)
    batch = tiny_batch(model)
    exact = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**batch)
    assert rounded.loss.dtype == torch.float32
    assert torch.isfinite(rounded.loss)
    difference = (rounded.logits.float() - exact.logits).detach().abs().max()
    assert float(difference / exact.logits.detach().abs().max()) < 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_under_autocast(fusion: str, family: str) -> None:
    model = tiny_model(fusion, family).train()
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    rounded = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.isfinite(rounded).all()
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.99
    assert 0.9 < float(rounded.norm() / exact.norm()) < 1.1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_bfloat16_model_runs(fusion: str) -> None:
    model = tiny_model(fusion).to(torch.bfloat16)
    output = model(**tiny_batch(model))
    assert output.logits.dtype == torch.bfloat16
    assert torch.isfinite(output.loss)
