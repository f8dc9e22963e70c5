"""The test helpers, on which the other tests rest."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mmfuse.fusion import FUSIONS
from mmfuse.sequence import Modality, TokenMap
from mmfuse.testing import (
    DEFAULT_LAYOUT,
    FAMILIES,
    IMAGE_TOKEN_ID,
    MEDIA_TOKEN_IDS,
    VOCABULARY,
    tiny_batch,
    tiny_model,
)

SAMPLES = [[("text", 2), ("image", 4), ("answer", 2)], [("text", 3)], [("image", 8), ("text", 1), ("answer", 1)]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_tiny_model_is_what_was_asked_for(family: str, kv_heads: int) -> None:
    model = tiny_model("mma", family, kv_heads=kv_heads)
    config = model.config.text_config
    assert (config.model_type, config.num_key_value_heads, config.num_hidden_layers) == (family, kv_heads, 2)
    assert type(model.fusion) is FUSIONS["mma"]
    assert not model.training
    assert model.visual_tokens() == 4
    assert sum(weight.numel() for weight in model.parameters()) < 50_000


def test_tiny_model_reacts_to_its_mask() -> None:
    """The reason for the large weights: strategies must differ by far more than rounding."""
    batch = tiny_batch(tiny_model())
    logits = [tiny_model(name)(**batch).logits for name in FUSIONS]
    for i, first in enumerate(logits):
        for second in logits[i + 1 :]:
            assert (first - second).abs().max() > 0.1


def test_overrides_and_unknown_families() -> None:
    assert tiny_model(num_hidden_layers=3).config.text_config.num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"unknown decoder family 'qwen': did you mean 'qwen\d'\?"):
        tiny_model(family="qwen")


def test_default_batch() -> None:
    batch: Any = tiny_batch(tiny_model())
    assert batch["tokens"] == TokenMap.from_layout(DEFAULT_LAYOUT).repeat(2)
    assert batch["input_ids"].shape == (2, 14)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["input_ids"] == IMAGE_TOKEN_ID, batch["tokens"].modality == Modality.IMAGE)
    text = batch["input_ids"][~batch["tokens"].is_media]
    assert int(text.min()) >= 4
    assert int(text.max()) < VOCABULARY
    assert batch["labels"].tolist() == torch.where(batch["tokens"].is_answer, batch["input_ids"], -100).tolist()
    assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_batches_and_packs_hold_the_same_contents() -> None:
    model = tiny_model()
    right, left, pack = (tiny_batch(model, SAMPLES, **how) for how in ({}, {"side": "left"}, {"pack": True}))
    assert pack["input_ids"].shape == (1, 8 + 3 + 10)
    for batch in (right, left, pack):
        live = ~batch["tokens"].is_pad
        assert torch.equal(batch["input_ids"][live], right["input_ids"][~right["tokens"].is_pad])
        assert torch.equal(batch["pixel_values"], right["pixel_values"])
        assert (batch["input_ids"][~live] == 0).all()
        assert (batch["labels"][~live] == -100).all()
    assert right["pixel_values"].shape[0] == 3
    other = tiny_batch(model, SAMPLES, seed=1)
    assert not torch.equal(other["input_ids"], right["input_ids"])
    assert "pixel_values" not in tiny_batch(model, [("text", 3)])


def test_runs_of_images_hold_whole_images() -> None:
    message = "a run of 6 image tokens is no multiple of 4, the tokens of one image"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_batch(tiny_model(), [("text", 1), ("image", 6)])


def test_other_modalities_come_as_features() -> None:
    model = tiny_model(modalities=("image", "audio", "eeg"))
    assert {name: model.visual_tokens(name) for name in model.encoders} == {"image": 4, "audio": 3, "eeg": 3}
    layouts = [[("text", 2), ("audio", 6), ("image", 4), ("answer", 2)], [("eeg", 3), ("text", 1), ("audio", 3)]]
    right, pack = tiny_batch(model, layouts), tiny_batch(model, layouts, pack=True)
    for batch in (right, pack):
        shapes = {name: tuple(batch[name].shape) for name in model.input_names.values()}
        assert shapes == {"pixel_values": (1, 3, 16, 16), "audio_features": (3, 3, 12), "eeg_features": (1, 3, 12)}
        assert torch.equal(batch["audio_features"], right["audio_features"])
        for name, token_id in MEDIA_TOKEN_IDS.items():
            assert torch.equal(batch["input_ids"] == token_id, batch["tokens"].modality == Modality[name.upper()])
        assert model(**batch).logits.isfinite().all()


def test_modalities_that_do_not_exist_or_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match=r"unknown modality 'adio': did you mean 'audio'\? Known: audio, eeg, image"):
        tiny_model(modalities=("adio",))
    with pytest.raises(ValueError, match=r"unknown modality of the model 'audio'\. Known: image"):
        tiny_batch(tiny_model(), [("text", 1), ("audio", 3)])
    assert tiny_model(modalities=())(torch.tensor([[5, 6]])).logits.shape == (1, 2, VOCABULARY)
