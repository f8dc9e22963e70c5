"""Adopted models in use: meta device, lower precision, tied weights, prefixes that serve many questions, suffixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmfuse.models import AdoptedConfig, AdoptedLM, MultimodalLM, PrefixCache

CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.mark.parametrize("fusion", ["native", "saisa"])
def test_the_published_size_builds_without_memory(vlm: Any, fusion: str) -> None:
    with torch.device("meta"):
        model = AdoptedLM(AdoptedConfig({"model_type": vlm.family}, fusion))
    assert sum(weight.numel() for weight in model.vlm.parameters()) > 1e8
    assert all(weight.is_meta for weight in model.parameters())
    assert all(sum(weight.numel() for weight in part.parameters()) > 0 for part in list(model.parts().values())[:3])


def test_bfloat16_trains_with_images_and_without(vlm: Any) -> None:
    model = MultimodalLM.from_vlm(vlm.folder, dtype=torch.bfloat16).train()
    assert model.dtype == torch.bfloat16
    for batch in (vlm.batch((1, 2)), vlm.text_only()):
        out = model(**{name: value for name, value in batch.items() if name != "labels"})
        assert out.logits.dtype == torch.bfloat16
        out.logits.float().pow(2).mean().backward()
        assert all(weight.grad is not None for weight in model.connectors.parameters())


def test_tied_weights_stay_tied(vlm: Any, tmp_path: Any) -> None:
    tied = vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    model = MultimodalLM.from_vlm(vlm.model)
    model.save_pretrained(tmp_path)
    for found in (model, MultimodalLM.from_pretrained(tmp_path)):
        assert (found.decoder.lm_head.weight is found.get_input_embeddings().weight) == tied
        assert found.decoder.lm_head.weight is not vlm.model.lm_head.weight


def test_a_prefix_serves_many_questions(vlm: Any) -> None:
    if vlm.family in ("paligemma", "gemma3"):
        pytest.skip("its own fusion lets a prefix see what follows, or its cache slides")
    model = MultimodalLM.from_vlm(vlm.folder)
    one, other = vlm.batch((2,)), vlm.batch((2,))
    other["input_ids"][0, -6] = one["input_ids"][0, -5]
    start = one["input_ids"].shape[1] - 8
    inputs = {name: one[name] for name in model.adapter.image_inputs if name in one}
    maps = [model.token_map(**batch, media=model.encode_media(batch)) for batch in map(without_pixels, (one, other))]
    prefix = PrefixCache(model, one["input_ids"][:, :start], maps[0].columns(0, start), **inputs)
    how = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    found = prefix.generate([one["input_ids"], other["input_ids"]], maps, **how)
    for batch, new in zip((one, other), found, strict=True):
        assert torch.equal(model.generate(**batch, **how)[0, -3:], new)


def without_pixels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("pixel_values", "labels")}


def test_suffixes_of_paligemma_are_causal(paligemma: Any) -> None:
    vlm = paligemma
    batch = vlm.batch((1, 2), suffix=["a cat", "left of the red mat"])
    assert (batch["token_type_ids"] == 1).sum() > 4
    original, model = AutoModelForImageTextToText.from_pretrained(vlm.folder), MultimodalLM.from_vlm(vlm.folder)
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, found = original(**batch), model(**batch)
        torch.testing.assert_close(found.logits[live], expected.logits[live], **CLOSE)
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
        batch["token_type_ids"].zero_()
        assert (original(**batch).logits - expected.logits)[live].abs().max() > 1e-2
