"""MultimodalProcessor: batches from conversations, and saving."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, SiglipImageProcessor

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalProcessor
from mmfuse.models.media import Features
from mmfuse.sequence import TokenMap


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def image_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 16, "width": 16}, do_convert_rgb=True)


@pytest.fixture
def processor() -> MultimodalProcessor:
    return MultimodalProcessor(image_processor(), load_tokenizer(), visual_tokens=4)


def ask(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


TALKS = [ask("<image>What is 3?", "35"), ask("1?", "7"), ask("<image>1<image>", "2")]
PICTURES = [[picture(0)], [], [picture(1), picture(2)]]


def test_a_batch_for_training(processor: MultimodalProcessor) -> None:
    batch = processor(TALKS, PICTURES)
    ids, tokens = batch["input_ids"], batch["tokens"]
    assert sorted(batch) == ["input_ids", "labels", "pixel_values", "tokens"]
    samples = [processor.encoder.encode_messages(t, p) for t, p in zip(TALKS, PICTURES, strict=True)]
    lengths = [len(sample) for sample in samples]
    assert lengths == [16, 8, 15]
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        assert ids[row, :length].tolist() == sample.input_ids.tolist()
        assert ids[row, length:].tolist() == [0] * (16 - length)
        fields = [getattr(tokens, name)[row, :length].tolist() for name in ("modality", "role", "segment", "turn")]
        assert fields == sample.table.tolist()
    assert tokens.is_pad.sum(1).tolist() == [0, 8, 1]
    assert tokens.position.tolist() == [[i if i < length else 0 for i in range(16)] for length in lengths]
    expected = TokenMap.batch([tokens.rows(i).columns(0, length) for i, length in enumerate(lengths)])
    assert tokens == expected, "padding holds what TokenMap says it holds"
    said = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert said == ["35<|end|>", "7<|end|>", "2<|end|>"]
    assert torch.equal(batch["labels"] != -100, tokens.is_answer)


def test_pixels_are_those_of_hugging_faces_processor(processor: MultimodalProcessor) -> None:
    pixels = processor(TALKS, PICTURES)["pixel_values"]
    expected = image_processor()([picture(0), picture(1), picture(2)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels, expected)


def test_a_batch_for_generation(processor: MultimodalProcessor) -> None:
    asked = [talk[:1] for talk in TALKS]
    batch = processor(asked, PICTURES, generation=True)
    assert sorted(batch) == ["input_ids", "pixel_values", "tokens"]
    assert batch["tokens"].is_pad.sum(1).tolist() == [0, 7, 0]
    assert not batch["tokens"].is_pad[:, -1].any()
    assert set(processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][:, -1].tolist())) == {"<|assistant|>"}
    full = processor(TALKS, PICTURES)
    assert batch["tokens"].rows(0) == full["tokens"].rows(0).columns(0, 13)
    assert torch.equal(batch["input_ids"][0], full["input_ids"][0, :13])


def test_one_conversation_may_stand_alone(processor: MultimodalProcessor) -> None:
    alone, listed = processor(TALKS[0], PICTURES[0]), processor(TALKS[:1], PICTURES[:1])
    assert torch.equal(alone["input_ids"], listed["input_ids"])
    assert alone["tokens"] == listed["tokens"]
    assert "pixel_values" not in processor(TALKS[1])
    assert "pixel_values" not in processor([TALKS[1], TALKS[1]])


def test_mismatches_name_the_conversation(processor: MultimodalProcessor) -> None:
    with pytest.raises(ValueError, match="conversation 2: 2 <image> placeholders in the text but 1 images"):
        processor(TALKS, [*PICTURES[:2], PICTURES[2][:1]])
    with pytest.raises(ValueError, match="conversation 0: 1 <image> placeholders in the text but 0 images"):
        processor(TALKS)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        processor(TALKS, PICTURES[:2])
    with pytest.raises(ValueError, match="a batch needs at least one sample"):
        processor.collate([])


@pytest.mark.parametrize("generation", [False, True])
def test_apply_chat_template_gives_the_encoders_ids(processor: MultimodalProcessor, generation: bool) -> None:
    talk = [
        {"role": "system", "content": "Read all digits."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is 3?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "35"}]},
    ][: 2 if generation else 3]
    rendered = processor.apply_chat_template(talk, add_generation_prompt=generation)
    expected = processor.encoder.encode_messages(talk, [picture(0)], generation=generation).input_ids.tolist()
    ids = processor.tokenizer.encode(rendered, add_special_tokens=False)
    at = ids.index(processor.encoder.media_ids["image"])
    assert ids[:at] + [ids[at]] * 4 + ids[at + 1 :] == expected


@pytest.mark.parametrize("load", [MultimodalProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_saved_and_loaded_processor_makes_the_same_batch(load: Any, tmp_path: Path) -> None:
    style = {"user": "<|user|>\n", "end": "<|end|>\n"}
    processor = MultimodalProcessor(image_processor(), load_tokenizer(), visual_tokens=3, chat_format=style)
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is MultimodalProcessor
    assert loaded.visual_tokens == 3
    assert loaded.chat_format == processor.chat_format
    assert loaded.chat_format["user"] == "<|user|>\n"
    assert loaded.chat_template == processor.chat_template
    one, other = processor(TALKS, PICTURES), loaded(TALKS, PICTURES)
    assert one["tokens"] == other["tokens"]
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(one[name], other[name])
    assert loaded.apply_chat_template(TALKS[0]) == processor.apply_chat_template(TALKS[0])


# Several modalities


SHAPES = {"image": [4, 5], "audio": [6, 3]}


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def listener(**changes: Any) -> MultimodalProcessor:
    """Takes images through a tower and audio as features."""
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<audio>"]}, replace_extra_special_tokens=False)
    settings = {"media_tokens": {"image": 4, "audio": 2}, "feature_shapes": {"audio": [6, 3]}, **changes}
    return MultimodalProcessor(image_processor(), tokenizer, **settings)


def test_each_modality_comes_by_its_own_keyword_in_reading_order() -> None:
    talks = [ask("<audio>1<image><audio>", "2"), ask("1?", "7"), ask("<audio>", "3")]
    clips = [features(6, 3, seed=n) for n in range(3)]
    audio = [[clips[0], clips[1].double().numpy()], [], [Features.of(clips[2], "clip.npy")]]
    batch = listener()(talks, [[picture(0)], [], []], audio)
    assert sorted(batch) == ["audio_features", "input_ids", "labels", "pixel_values", "tokens"]
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert torch.equal(batch["audio_features"], torch.stack(clips))
    assert batch["tokens"].modality.sum(1).tolist() == [2 * 2 * 2 + 4, 0, 2 * 2]
    assert torch.equal(listener()(talks[2], audio=[clips[2]])["audio_features"], clips[2][None])
    assert torch.equal(listener()(talks[2], audio=clips[2][None])["audio_features"], clips[2][None])


def test_images_may_come_as_features() -> None:
    processor = listener(feature_shapes=SHAPES)
    batch = processor(ask("<image>", "2"), [features(4, 5)])
    assert torch.equal(batch["image_features"], features(4, 5)[None])
    with pytest.raises(ValueError, match="conversation 0, image 0: features must be an array or a tensor"):
        processor(ask("<image>", "2"), [picture(0)])
    with pytest.raises(TypeError, match=re.escape("a.npy: the model takes images, and these are features")):
        listener()(ask("<image>", "2"), [Features.of(features(4, 5), "a.npy")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (features(5, 3), "conversation 0, audio 0: features have shape [5, 3], the model takes [6, 3]"),
        (features(1, 6, 3), "conversation 0, audio 0: features must be [V, D] (tokens, width), got shape [1, 6, 3]"),
        (features(6, 3).long(), "conversation 0, audio 0: features must be floating point, got int64"),
        (features(6, 3) / 0, "conversation 0, audio 0: 18 of 18 features are NaN or infinite"),
        (np.full((6, 3), 1e300), "conversation 0, audio 0: 18 of 18 features are NaN or infinite"),
        ("clip.wav", "conversation 0, audio 0: features must be an array or a tensor [V, D], got str"),
        (Features.of(features(5, 3), "b.npy"), "b.npy: features have shape [5, 3], the model takes [6, 3]"),
    ],
)
def test_features_that_cannot_be_used_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        listener()(ask("<audio>", "2"), audio=[given])


@pytest.mark.parametrize("load", [MultimodalProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_saved_and_loaded_processor_knows_its_modalities(load: Any, tmp_path: Path) -> None:
    processor = listener()
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.media_tokens, loaded.feature_shapes) == ({"image": 4, "audio": 2}, {"audio": [6, 3]})
    given = (ask("<audio><image>1", "2"), [picture(0)], [features(6, 3)])
    for name, value in processor(*given).items():
        same = loaded(*given)[name]
        assert value == same if name == "tokens" else torch.equal(value, same)


def test_a_processor_that_was_saved_with_visual_tokens_is_read(tmp_path: Path) -> None:
    MultimodalProcessor(image_processor(), load_tokenizer()).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    del saved["media_tokens"], saved["feature_shapes"]
    path.write_text(json.dumps({**saved, "visual_tokens": 4}))
    loaded = MultimodalProcessor.from_pretrained(tmp_path)
    assert loaded.visual_tokens == 4
    assert loaded.media_tokens == {"image": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"media_tokens": {"adio": 1}}, "unknown modality 'adio': did you mean 'audio'?"),
        ({"media_tokens": {"audio": 1}}, "audio comes as features; feature_shapes must say in which shape"),
        ({"feature_shapes": {"audio": [1, 2]}}, "feature_shapes names audio, media_tokens does not"),
        ({"visual_tokens": 1, "media_tokens": {"image": 1}}, "give `media_tokens` or, for images alone, `visual_t"),
        ({"media_tokens": {"eeg": 1}, "feature_shapes": {"eeg": [1, 2]}}, "the tokenizer does not know <eeg>"),
    ],
)
def test_modalities_must_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MultimodalProcessor(image_processor(), load_tokenizer(), **settings)


def test_processor_refuses() -> None:
    message = "unknown key in chat_format 'asistant': did you mean 'assistant'?"
    with pytest.raises(ConfigError, match=re.escape(message)):
        MultimodalProcessor(image_processor(), load_tokenizer(), chat_format={"asistant": "x"})
    bare = load_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad_token"):
        MultimodalProcessor(image_processor(), bare)
