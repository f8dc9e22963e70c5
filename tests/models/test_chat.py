"""From messages to token ids with roles, against tables that were written by hand."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
from jinja2 import Environment

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.models.chat import ChatEncoder, ChatFormat, EncodedSample, content_text, without_placeholders

TOKENIZER = load_tokenizer()
VISUAL = 2
ENCODER = ChatEncoder(TOKENIZER, ChatFormat(), media_tokens={"image": VISUAL})
IMAGE = object()  # the encoder passes images through without looking at them

ROLES = {1: "prompt", 2: "answer"}
MODALITIES = {0: "text", 1: "image", 2: "audio", 3: "eeg"}


def table(sample: EncodedSample) -> list[tuple[str, str, str, int, int]]:
    """(token, modality, role, segment, turn) of every slot."""
    names = TOKENIZER.convert_ids_to_tokens(sample.input_ids.tolist())
    modality, role, segment, turn = sample.table.tolist()
    columns = zip(names, modality, role, segment, turn, strict=True)
    return [(name, MODALITIES[m], ROLES[r], s, t) for name, m, r, s, t in columns]


def test_one_question_about_one_image() -> None:
    messages = [{"role": "user", "content": "<image>What is 3?"}, {"role": "assistant", "content": "35"}]
    assert table(ENCODER.encode_messages(messages, [IMAGE])) == [
        ("<|bos|>", "text", "prompt", 0, 0),
        ("<|user|>", "text", "prompt", 0, 0),
        ("<image>", "image", "prompt", 1, 0),
        ("<image>", "image", "prompt", 1, 0),
        ("What", "text", "prompt", 2, 0),
        ("Ġis", "text", "prompt", 2, 0),
        ("Ġ", "text", "prompt", 2, 0),
        ("3", "text", "prompt", 2, 0),
        ("?", "text", "prompt", 2, 0),
        ("<|end|>", "text", "prompt", 2, 0),
        ("<|assistant|>", "text", "prompt", 2, 0),
        ("3", "text", "answer", 3, 0),
        ("5", "text", "answer", 3, 0),
        ("<|end|>", "text", "answer", 3, 0),
    ]


def test_system_several_images_and_two_turns() -> None:
    messages = [
        {"role": "system", "content": "What"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "3"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]
    sample = ENCODER.encode_messages(messages, ["a", "b", "c"])
    assert sample.images == ["a", "b", "c"]
    assert table(sample) == [
        ("<|bos|>", "text", "prompt", 0, 0),
        ("<|system|>", "text", "prompt", 0, 0),
        ("What", "text", "prompt", 0, 0),
        ("<|end|>", "text", "prompt", 0, 0),
        ("<|user|>", "text", "prompt", 0, 0),
        *[("<image>", "image", "prompt", 1, 0)] * 2,
        *[("<image>", "image", "prompt", 2, 0)] * 2,
        ("1", "text", "prompt", 3, 0),
        ("?", "text", "prompt", 3, 0),
        ("<|end|>", "text", "prompt", 3, 0),
        ("<|assistant|>", "text", "prompt", 3, 0),
        ("2", "text", "answer", 4, 0),
        ("<|end|>", "text", "answer", 4, 0),
        ("<|user|>", "text", "prompt", 5, 1),
        ("3", "text", "prompt", 5, 1),
        *[("<image>", "image", "prompt", 6, 1)] * 2,
        ("<|end|>", "text", "prompt", 7, 1),
        ("<|assistant|>", "text", "prompt", 7, 1),
        ("4", "text", "answer", 8, 1),
        ("<|end|>", "text", "answer", 8, 1),
    ]


@pytest.fixture(scope="module")
def everything() -> ChatEncoder:
    """An encoder for every modality, with a tokenizer of its own."""
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<audio>", "<eeg>"]}, replace_extra_special_tokens=False
    )
    encoder = ChatEncoder(tokenizer, ChatFormat(), {"image": 2, "audio": 3, "eeg": 1})
    return pickle.loads(pickle.dumps(encoder))  # noqa: S301  # safe: pickled on this line


def test_several_modalities(everything: ChatEncoder) -> None:
    parts = [{"type": "audio"}, {"type": "text", "text": "1"}, {"type": "image"}, {"type": "eeg"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "<audio>2"}]
    sample = everything.encode_messages(messages, {"image": ["i"], "audio": ["a", "b"], "eeg": ("e",)})
    assert sample.media == {"image": ["i"], "audio": ["a", "b"], "eeg": ["e"]}
    assert sample.images == ["i"]
    names = everything.tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    modality, role, segment, _ = sample.table.tolist()
    assert list(zip(names, (MODALITIES[m] for m in modality), segment, strict=True)) == [
        *[("<|bos|>", "text", 0), ("<|user|>", "text", 0)],
        *[("<audio>", "audio", 1)] * 3,
        ("1", "text", 2),
        *[("<image>", "image", 3)] * 2,
        ("<eeg>", "eeg", 4),
        *[("<|end|>", "text", 5), ("<|assistant|>", "text", 5)],
        *[("<audio>", "audio", 6)] * 3,
        *[("2", "text", 7), ("<|end|>", "text", 7)],
    ]
    assert {r for r, m in zip(role, modality, strict=True) if m} == {1}, "media are prompt, also in an answer"


@pytest.mark.parametrize(
    ("text", "media", "message"),
    [
        ("<audio>1<image>", {"image": ["i"]}, "row 7: 1 <audio> placeholders in the text but 0 audio clips"),
        ("<eeg>", {"eeg": ["a", "b"]}, "row 7: 1 <eeg> placeholders in the text but 2 EEG recordings"),
    ],
)
def test_placeholders_must_match_in_each_modality(
    everything: ChatEncoder, text: str, media: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        everything.encode_messages([{"role": "user", "content": text}], media, key="row 7")


def test_modalities_that_the_model_lacks() -> None:
    ask = [{"role": "user", "content": "1"}]
    with pytest.raises(ValueError, match="row 7: the model takes image, but 2 audio clips are given"):
        ENCODER.encode_messages(ask, {"audio": ["a", "b"]}, key="row 7")
    with pytest.raises(ValueError, match=r"row 7: unknown content part 'audio'\. Known: image, text"):
        ENCODER.encode_messages([{"role": "user", "content": [{"type": "audio"}]}], key="row 7")
    said = ENCODER.encode_messages([{"role": "user", "content": "<audio>"}])
    assert TOKENIZER.decode(said.input_ids) == "<|bos|><|user|><audio><|end|>", "to this model it is text"
    with pytest.raises(ValueError, match="row 7: the model takes text only, but 1 images are given"):
        ChatEncoder(TOKENIZER, ChatFormat(), {}).encode_messages(ask, ["i"], key="row 7")


def test_a_prompt_for_generation_ends_with_the_answer_header() -> None:
    question = [{"role": "user", "content": "1?"}]
    prompt = ENCODER.encode_messages(question, generation=True)
    assert [row[0] for row in table(prompt)] == ["<|bos|>", "<|user|>", "1", "?", "<|end|>", "<|assistant|>"]
    assert {row[2] for row in table(prompt)} == {"prompt"}
    answered = ENCODER.encode_messages([*question, {"role": "assistant", "content": "7"}])
    assert answered.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    assert np.array_equal(answered.table[:, : len(prompt)], prompt.table)


def test_a_document_is_all_answer() -> None:
    assert table(ENCODER.encode_document("<image>What 1", [IMAGE])) == [
        ("<|bos|>", "text", "prompt", 0, 0),
        *[("<image>", "image", "prompt", 1, 0)] * 2,
        ("What", "text", "answer", 2, 0),
        ("Ġ", "text", "answer", 2, 0),
        ("1", "text", "answer", 2, 0),
        ("<|end|>", "text", "answer", 2, 0),
    ]


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ("1?", [IMAGE], "row 7: 0 <image> placeholders in the text but 1 images"),
        ("<image>1?<image>", [IMAGE], "row 7: 2 <image> placeholders in the text but 1 images"),
        ([{"type": "text", "text": "1"}, {"type": "image"}], [], "row 7: 1 <image> placeholders in the text but 0"),
        ([{"type": "imag"}], [IMAGE], "row 7: unknown content part 'imag': did you mean 'image'? Known: image, text"),
        ([{"text": "1"}], [], "row 7: unknown content part None"),
    ],
)
def test_placeholders_must_match_the_images(content: Any, images: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ENCODER.encode_messages([{"role": "user", "content": content}], images, key="row 7")


def test_a_mismatch_in_a_document_names_its_key() -> None:
    with pytest.raises(ValueError, match="page 3: 0 <image> placeholders in the text but 1 images"):
        ENCODER.encode_document("What", [IMAGE], key="page 3")


def test_unknown_roles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown message role 'usr': did you mean 'user'\?"):
        ENCODER.encode_messages([{"role": "usr", "content": "1"}])


def test_content_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": " b"}]
    assert content_text(parts) == "a<image> b"
    assert content_text("plain") == "plain"
    assert content_text([{"type": "audio"}, {"type": "eeg"}]) == "<audio><eeg>"
    assert without_placeholders(" <image>\nWhat <audio>is it? <eeg>") == "What is it?"


CONVERSATIONS = [
    [{"role": "user", "content": "What is 3?"}],
    [{"role": "user", "content": "<image>1?"}, {"role": "assistant", "content": " 12, 3"}],
    [
        {"role": "system", "content": "Read all digits.\n"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat's 4 ?\n\n"}]},
        {"role": "assistant", "content": "\n\n 7 and seven\n"},
        {"role": "user", "content": "  3"},
        {"role": "assistant", "content": ""},
    ],
]
TEMPLATED = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "3"}, {"type": "eeg"}]}]
FORMATS = {
    "default": ChatFormat(),
    "lines": ChatFormat(system="<|system|>\n", user="<|user|>\n", assistant="<|assistant|>\n", end="<|end|>\n"),
    "quotes": ChatFormat(user='<|user|>it\'s "so" \\n ', assistant="<|assistant|>{{ 'a' }}", end="\\<|end|>"),
}


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_template_renders_what_the_encoder_encodes(name: str, conversation: Any, generation: bool) -> None:
    style = FORMATS[name]
    encoder = ChatEncoder(TOKENIZER, style, media_tokens={"image": 1})
    texts = [style.begin]
    images = 0
    for message in conversation:
        content = content_text(message["content"])
        images += content.count("<image>")
        texts.append(style.header(message["role"]) + content + style.end)
    rendered = (
        Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(style.template())
        .render(messages=conversation, add_generation_prompt=generation)
    )
    assert rendered == "".join(texts) + (style.assistant if generation else "")
    sample = encoder.encode_messages(conversation, [IMAGE] * images, generation=generation)
    assert TOKENIZER.decode(sample.input_ids, skip_special_tokens=False) == rendered
    if name != "quotes":
        assert sample.input_ids.tolist() == TOKENIZER.encode(rendered, add_special_tokens=False)


def test_the_template_knows_every_modality() -> None:
    rendered = Environment().from_string(ChatFormat().template()).render(messages=TEMPLATED)
    assert rendered == "<|bos|><|user|><audio>3<eeg><|end|>"
