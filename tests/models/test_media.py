"""Several modalities in one model: by which keywords they come, where they go, and what is refused."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalConfig, MultimodalLM
from mmfuse.models.media import INPUT_NAMES, MEDIA
from mmfuse.models.modeling import Embedded
from mmfuse.sequence import Modality
from mmfuse.testing import tiny_batch, tiny_model

ALL = ("image", "audio", "eeg")
MIXED = [
    [("text", 2), ("image", 4), ("audio", 3), ("text", 2), ("answer", 2)],
    [("audio", 6), ("text", 3), ("answer", 2)],
    [("eeg", 3), ("text", 1), ("image", 8), ("audio", 3), ("answer", 1)],
]


def media_of(model: MultimodalLM, batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in model.input_names.values() if name in batch}


def features_model(**changes: Any) -> MultimodalLM:
    """Images as features, in a decoder whose encoder is given by `changes`."""
    spec = {"type": "precomputed", "hidden_size": 12, "num_tokens": 4, **changes}
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 4, "initializer_range": 0.2}
    parts = {"encoders": {"image": spec}, "connectors": {"image": {"type": "linear"}}, "media_token_ids": {"image": 3}}
    return MultimodalLM(MultimodalConfig(text_config=text, **parts)).eval()


def test_the_table_covers_every_modality_and_every_keyword_of_forward() -> None:
    assert [name.upper() for name in MEDIA] == [modality.name for modality in Modality if modality != Modality.TEXT]
    parameters = list(inspect.signature(MultimodalLM.forward).parameters)
    assert list(INPUT_NAMES) == ["pixel_values", "image_features", "audio_features", "eeg_features"]
    at = parameters.index("pixel_values")
    assert parameters[at : at + 4] == list(INPUT_NAMES)


def test_keywords_follow_from_the_encoders() -> None:
    assert tiny_model().input_names == {"image": "pixel_values"}
    names = {"image": "pixel_values", "audio": "audio_features", "eeg": "eeg_features"}
    assert tiny_model(modalities=ALL).input_names == names
    assert features_model().input_names == {"image": "image_features"}


def test_a_tower_for_images_takes_no_other_modality() -> None:
    config = tiny_model().config
    for part in (config.encoders, config.connectors, config.media_token_ids):
        part["audio"] = part.pop("image")
    with pytest.raises(ConfigError, match="encoder 'hf' takes pixels; for audio there is `precomputed`"):
        MultimodalLM(config)


def test_each_modality_stands_in_its_own_slots_in_reading_order() -> None:
    model = tiny_model(modalities=ALL)
    batch: Any = tiny_batch(model, MIXED)
    media = model.media_inputs(media_of(model, batch))
    embedded = model._embed(batch["input_ids"], batch["tokens"], media)
    assert isinstance(embedded, Embedded)
    assert {name: tuple(value.shape) for name, value in embedded.features.items()} == {
        "image": (3, 4, 16),
        "audio": (4, 3, 12),
        "eeg": (1, 3, 12),
    }
    for name in ALL:
        slots = batch["tokens"].modality == Modality[name.upper()]
        placed = model.connectors[name](embedded.features[name])
        assert torch.equal(embedded.embeds[slots], placed.flatten(0, 1))
    assert torch.equal(embedded.features["audio"], batch["audio_features"])
    text = ~batch["tokens"].is_media
    assert torch.equal(embedded.embeds[text], model.get_input_embeddings()(batch["input_ids"])[text])


def test_every_medium_changes_the_answer() -> None:
    model = tiny_model("mma", modalities=ALL)
    batch = tiny_batch(model, [[("image", 4), ("audio", 3), ("eeg", 3), ("text", 2), ("answer", 2)]])
    logits = model(**batch).logits
    for name in model.input_names.values():
        changed = model(**batch | {name: -batch[name]}).logits
        assert (changed - logits)[:, -1].abs().max() > 1e-2, name


def test_a_training_batch_runs_the_encoders_of_what_it_lacks() -> None:
    model = tiny_model(modalities=ALL)
    batch: Any = tiny_batch(model, [("text", 2), ("image", 4), ("answer", 2)])
    expected = model(**batch).logits
    given = {"image": batch["pixel_values"]}
    assert list(model._embed(batch["input_ids"], batch["tokens"], given).features) == ["image"]
    model.train()
    features = model._embed(batch["input_ids"], batch["tokens"], given).features
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {"image": (2, 4, 16), "audio": (1, 3, 12), "eeg": (1, 3, 12)}
    out = model(**batch)
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    for name in ("audio", "eeg"):
        for weight in model.connectors[name].parameters():
            assert weight.grad is not None and bool((weight.grad == 0).all()), name


def test_counts_must_agree_in_each_modality() -> None:
    model = tiny_model(modalities=("image", "audio"))
    batch: Any = tiny_batch(model, [[("image", 4), ("audio", 6), ("answer", 1)], [("audio", 3), ("answer", 1)]])
    audio = batch.pop("audio_features")
    message = "9 audio placeholders in the batch (by sample: [6, 3]) but 6 features: 2 inputs × 3 tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**batch, audio_features=audio[:2])
    with pytest.raises(ValueError, match="the batch has 9 audio tokens but no audio inputs were given"):
        model(**batch)
    with pytest.raises(ValueError, match=re.escape("features have shape [3, 3, 11], the encoder takes [N, 3, 12]")):
        model(**batch, audio_features=audio[..., 1:])


@pytest.mark.parametrize("name", ["image_features", "audio_features"])
def test_inputs_that_the_model_does_not_take_are_refused(name: str) -> None:
    model = tiny_model()
    batch: Any = tiny_batch(model, side="left")
    extra = {name: torch.zeros(1, 3, 12)}
    message = f"the model takes pixel_values; {name} has no encoder here"
    with pytest.raises(ValueError, match=message):
        model(**batch, **extra)
    del batch["labels"]
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, **extra, max_new_tokens=1)
    with pytest.raises(TypeError, match="audio_featurs"):
        model(**batch, audio_featurs=None)
    with pytest.raises(ValueError, match="audio_featurs"):
        model.generate(**batch, audio_featurs=torch.zeros(1), max_new_tokens=1)
    with pytest.raises(ValueError, match="the model takes text only; pixel_values has no encoder here"):
        tiny_model(modalities=())(torch.tensor([[5]]), pixel_values=batch["pixel_values"])


def test_features_are_computed_with_in_the_models_dtype() -> None:
    model = features_model().to(torch.bfloat16)
    ids = torch.tensor([[5, 3, 3, 3, 3, 6]])
    assert model(ids, image_features=torch.randn(1, 4, 12)).logits.dtype == torch.bfloat16


def test_images_may_come_as_features(tmp_path: Path) -> None:
    model = features_model(grid=[2, 2])
    ids, features = torch.tensor([[5, 3, 3, 3, 3, 6]]), torch.randn(1, 4, 12)
    logits = model(ids, image_features=features).logits
    with pytest.raises(ValueError, match="the model takes image_features; pixel_values has no encoder here"):
        model(ids, pixel_values=torch.zeros(1, 3, 16, 16))
    model.save_pretrained(tmp_path)
    loaded, report = MultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: names for kind, names in report.items() if names} == {}
    assert loaded.config.encoders == model.config.encoders
    assert torch.equal(loaded(ids, image_features=features).logits, logits)


# Generation


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_keep_the_media_of_their_sample(use_cache: bool) -> None:
    """Ragged counts in two modalities: each beam is scored again with the media of its own sample alone."""
    model = tiny_model("mma", modalities=("image", "audio"))
    layouts = [
        [("image", 4), ("audio", 3), ("text", 2)],
        [("text", 3)],
        [("audio", 6), ("text", 1), ("image", 8), ("text", 1)],
    ]
    batch: Any = tiny_batch(model, layouts, side="left")
    del batch["labels"]
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(**batch, num_beams=3, num_return_sequences=3, length_penalty=1.0, **options)
    own = [
        {"pixel_values": batch["pixel_values"][:1], "audio_features": batch["audio_features"][:1]},
        {},
        {"pixel_values": batch["pixel_values"][1:], "audio_features": batch["audio_features"][1:]},
    ]
    prompt = batch["input_ids"].shape[1]
    for beam, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        tokens = batch["tokens"].rows(beam // 3).append(4)
        logits = model(sequence[None], tokens, **own[beam // 3]).logits[0, prompt - 1 : -1]
        said = logits.log_softmax(-1).gather(1, sequence[prompt:, None]).sum() / 4
        torch.testing.assert_close(said, score, rtol=0, atol=1e-5)


def test_the_map_is_made_of_every_modalitys_placeholder() -> None:
    model = tiny_model(modalities=ALL)
    batch: Any = tiny_batch(model, [[("image", 4), ("audio", 3), ("text", 2), ("eeg", 3), ("text", 2)]])
    made = model.token_map(batch["input_ids"])
    assert torch.equal(made.modality, batch["tokens"].modality)
    assert torch.equal(made.segment, batch["tokens"].segment)
