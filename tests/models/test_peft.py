"""LoRA by PEFT on top of a MultimodalLM: what trains, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mmfuse.models import MultimodalLM
from mmfuse.testing import FAMILIES, tiny_batch, tiny_model

PROJECTIONS = {"phi3": ["qkv_proj", "o_proj"]}


def adapted(family: str = "llama", **options: Any) -> tuple[MultimodalLM, PeftModel]:
    base = tiny_model("mma", family)
    names = PROJECTIONS.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"])
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=rf"decoder\..*\.({'|'.join(names)})",
        modules_to_save=["connectors.image"],
        **options,
    )
    return base, get_peft_model(base, config)


def train(model: PeftModel, batch: dict[str, Any], steps: int = 5) -> list[float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_trains_and_nothing_else(family: str, tmp_path: Path) -> None:
    base, model = adapted(family)
    batch = tiny_batch(base)
    torch.testing.assert_close(model(**batch).logits, tiny_model("mma", family)(**batch).logits, rtol=0, atol=0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = train(model.train(), batch)
    assert losses[-1] < losses[0] - 0.1
    for name, weight in model.named_parameters():
        trains = "lora_" in name or "modules_to_save" in name
        assert weight.requires_grad == trains, name
        assert (weight.grad is not None) == trains, name
        assert torch.equal(weight, before[name]) != trains, name
    assert any("connectors.image.modules_to_save" in name for name in before)

    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("mma", family), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (loaded(**batch).logits - tiny_model("mma", family)(**batch).logits).abs().max() > 1e-2


def test_a_trained_adapter_can_be_merged_and_saved_as_a_plain_model(tmp_path: Path) -> None:
    base, model = adapted()
    batch = tiny_batch(base)
    train(model.train(), batch, steps=2)
    expected = model.eval()(**batch).logits
    merged = model.merge_and_unload()
    assert type(merged) is MultimodalLM
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(
        MultimodalLM.from_pretrained(tmp_path)(**batch).logits, merged(**batch).logits, rtol=0, atol=0
    )


def test_gradient_checkpointing_reaches_the_adapter() -> None:
    base, model = adapted()
    batch = tiny_batch(base)
    for weight in model.parameters():  # LoRA begins at 0, where the gradient of its first factor is 0
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    model.train()(**batch).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    base.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=0, atol=1e-6)


def test_an_adapted_model_generates() -> None:
    base, model = adapted()
    batch = tiny_batch(base, [("text", 2), ("image", 4), ("text", 3)])
    del batch["labels"]
    train(model.train(), tiny_batch(base), steps=2)
    model.eval()
    sequences = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    tokens, ids = batch["tokens"], batch["input_ids"]
    for _ in range(4):
        logits = model(input_ids=ids, tokens=tokens, pixel_values=batch["pixel_values"]).logits
        ids, tokens = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1), tokens.append()
    assert torch.equal(sequences, ids)
