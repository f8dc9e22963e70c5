"""MultimodalProcessor: batches from conversations, and saving."""

from __future__ import annotations

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


def test_processor_refuses() -> None:
    message = "unknown key in chat_format 'asistant': did you mean 'assistant'?"
    with pytest.raises(ConfigError, match=re.escape(message)):
        MultimodalProcessor(image_processor(), load_tokenizer(), chat_format={"asistant": "x"})
    bare = load_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad_token"):
        MultimodalProcessor(image_processor(), bare)
