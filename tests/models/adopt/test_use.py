"""Adopted models in use: meta device, lower precision, tied weights, prefixes that serve many questions, suffixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmfuse.errors import ConfigError
from mmfuse.models import AdoptedConfig, AdoptedLM, MultimodalLM, PrefixCache
from mmfuse.sequence import TokenMap
from mmfuse.testing.vlms import tiny_vlm

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


def test_packed_samples_are_what_they_are_alone(vlm: Any) -> None:
    """Positions and grids of each sample come from its own map, so that documents of M-RoPE models pack too."""
    model = MultimodalLM.from_vlm(vlm.folder)
    batch = vlm.batch((1, 2))
    live = batch["attention_mask"].bool()
    media = model.encode_media(batch)
    labels = batch["input_ids"].masked_fill(live.flip(1).cumsum(1).flip(1) > 3, -100)
    tokens = model.token_map(**without_pixels(batch), labels=labels, media=media)
    rows = [tokens.rows(row).select(live[row : row + 1]) for row in range(2)]
    with torch.no_grad():
        apart = model(batch["input_ids"], tokens, media=media, labels=labels)
        flat = {"input_ids": batch["input_ids"][live].unsqueeze(0), "labels": labels[live].unsqueeze(0)}
        packed = model(tokens=TokenMap.pack(rows), media=media, **flat)
    torch.testing.assert_close(packed.logits[0], apart.logits[live], **CLOSE)
    torch.testing.assert_close(packed.loss, apart.loss, **CLOSE)


def test_the_cache_is_the_fusions(llava: Any) -> None:
    """Published checkpoints name caches in their generation config."""
    original, _ = tiny_vlm("llava")
    original.generation_config.cache_implementation = "static"
    model = MultimodalLM.from_vlm(original, "cross_attention")
    assert model.generate(**llava.batch((1,)), max_new_tokens=2).shape[0] == 1
    assert original.generation_config.cache_implementation == "static"


def test_decoders_that_ask_for_more_are_refused() -> None:
    """PaliGemma 2: its decoder caps attention scores."""
    with pytest.raises(ConfigError, match=r"unknown decoder of a paligemma 'gemma2'"):
        AdoptedConfig({"model_type": "paligemma", "text_config": {"model_type": "gemma2"}})
    with pytest.raises(ConfigError, match=r"use_bidirectional_attention is set"):
        AdoptedConfig(
            {"model_type": "llava", "text_config": {"model_type": "gemma", "use_bidirectional_attention": True}}
        )


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
