"""Under its native fusion an adopted model computes what the original does, from its processor's own output."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmfuse.errors import ConfigError
from mmfuse.models import AdoptedLM, MultimodalLM
from mmfuse.models.adopt import ADAPTERS
from mmfuse.testing.vlms import VLMS, tiny_vlm

CLOSE = {"rtol": 0.0, "atol": 1e-5}


def live(batch: dict[str, Any], values: Tensor) -> Tensor:
    return values[batch["attention_mask"].bool()]


def supervised(vlm: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the last three tokens of each row as answers, padded on the right."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    places = batch["attention_mask"].cumsum(1)
    labels[places <= places.amax(1, keepdim=True) - 3] = -100
    made = {**batch, "labels": labels}
    if vlm.family == "paligemma":  # its processor marks answers so
        made["token_type_ids"] = (labels != -100).long()
    return made


def test_every_architecture_is_tested() -> None:
    assert set(VLMS) == set(ADAPTERS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_equals_the_original(vlm: Any, side: str) -> None:
    model = MultimodalLM.from_vlm(vlm.folder)
    original = AutoModelForImageTextToText.from_pretrained(vlm.folder)
    for images in ((1,), (2,), (1, 2)):
        batch = vlm.batch(images, side=side)
        with torch.no_grad():
            expected, found = original(**batch).logits, model(**batch).logits
        torch.testing.assert_close(live(batch, found), live(batch, expected), **CLOSE)
        assert live(batch, expected).abs().max() > 0.1
    batch = vlm.text_only()
    with torch.no_grad():
        torch.testing.assert_close(live(batch, model(**batch).logits), live(batch, original(**batch).logits), **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_original(vlm: Any, beams: int) -> None:
    model = MultimodalLM.from_vlm(vlm.folder)
    original = AutoModelForImageTextToText.from_pretrained(vlm.folder)
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "min_new_tokens": 6}
    # Hugging Face's own beams repeat images as if there were one a sample.
    for batch in (vlm.batch((1, 2) if beams == 1 else (1, 1)), vlm.text_only()):
        expected = original.generate(**batch, **how, output_logits=True, return_dict_in_generate=True)
        found = model.generate(**batch, **how, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected.sequences)
        for mine, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)


def test_beams_repeat_the_images_of_a_sample_together(vlm: Any) -> None:
    model = MultimodalLM.from_vlm(vlm.folder)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "min_new_tokens": 4}
    both = vlm.batch((2, 1))
    found = model.generate(**both, **how)[:, both["input_ids"].shape[1] :]
    single = vlm.batch((2,))
    alone = model.generate(**single, **how)[:, single["input_ids"].shape[1] :]
    assert torch.equal(found[0], alone[0])


def test_the_original_works_on_as_before(vlm: Any) -> None:
    original, _ = tiny_vlm(vlm.family)
    batch = vlm.batch((1,))
    with torch.no_grad():
        before = original(**batch).logits
    weights = copy.deepcopy(original.state_dict())
    model = MultimodalLM.from_vlm(original, "mma").train()
    with torch.no_grad():
        assert torch.equal(original(**batch).logits, before)
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(parameter.requires_grad for parameter in original.parameters())
    assert not original.training
    with torch.no_grad():
        assert torch.equal(original(**batch).logits, before)
    original.generate(**batch, max_new_tokens=2, do_sample=False)
    assert all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())


def test_saved_and_loaded_gives_equal_logits(vlm: Any, tmp_path: Path) -> None:
    batch = vlm.batch((1, 2))
    model = MultimodalLM.from_vlm(vlm.folder, "saisa")
    model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    for loaded in (MultimodalLM.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert isinstance(loaded, AdoptedLM)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(vlm.processor)
    assert again.chat_template == vlm.processor.chat_template


def test_the_original_class_loads_what_is_inside(vlm: Any, tmp_path: Path) -> None:
    """The names of all weights are the original's."""
    model = MultimodalLM.from_vlm(vlm.folder)
    model.vlm.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(vlm.model)
    batch = vlm.batch((1,))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **CLOSE)


def test_checkpointed_training_gives_the_originals_gradients(vlm: Any) -> None:
    batch = supervised(vlm, vlm.batch((1, 2), side="right"))
    original = AutoModelForImageTextToText.from_pretrained(vlm.folder).train()
    model = MultimodalLM.from_vlm(vlm.folder).train()
    model.activation_checkpointing_enable()
    found, wanted = model(**batch).loss, original(**batch).loss
    torch.testing.assert_close(found, wanted, **CLOSE)
    found.backward()
    wanted.backward()
    expected = {name: weight.grad for name, weight in original.named_parameters()}
    for name, weight in model.vlm.named_parameters():
        if expected[name] is None:
            assert weight.grad is None or not weight.grad.any(), name
        else:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_text_only_training_still_runs_the_tower(vlm: Any) -> None:
    model = MultimodalLM.from_vlm(vlm.folder).train()
    out = model(**supervised(vlm, vlm.text_only()))
    assert torch.isfinite(out.loss)
    out.loss.backward()
    touched = [weight.grad is not None for weight in model.connectors.parameters()]
    assert touched and all(touched)


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ConfigError, match=r"unknown vision-language model .model_type. 'blip'.*llava.*To add one"):
        MultimodalLM.from_vlm(tmp_path)


def test_wrong_inputs_are_named(llava: Any) -> None:
    vlm = llava
    model = MultimodalLM.from_vlm(vlm.folder)
    batch = vlm.batch((1,))
    with pytest.raises(TypeError, match=r"a llava takes pixel_values.*pixel_values_videos is not supported"):
        model(**batch, pixel_values_videos=batch["pixel_values"])
    pixels = batch.pop("pixel_values")
    with pytest.raises(ValueError, match="4 image tokens but no images"):
        model(**batch)
    with pytest.raises(ValueError, match=r"4 image placeholders.*\[4\].* but 8 features \(by image: \[4, 4\]\)"):
        model(**batch, pixel_values=torch.cat([pixels, pixels]))
    with pytest.raises(ConfigError, match="dtype is for loading a folder"):
        MultimodalLM.from_vlm(vlm.model, dtype=torch.float32)
    with pytest.raises(ConfigError, match="trust_remote_code is not supported"):
        MultimodalLM.from_vlm(vlm.folder, trust_remote_code=True)  # safe: it is refused
