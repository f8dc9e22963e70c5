"""From messages to token ids with roles, against tables that were written by hand."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from jinja2 import Environment

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.models.chat import ChatEncoder, ChatFormat, EncodedSample, content_text

TOKENIZER = load_tokenizer()
VISUAL = 2
ENCODER = ChatEncoder(TOKENIZER, ChatFormat(), media_tokens={"image": VISUAL})
IMAGE = object()  # the encoder passes images through without looking at them

ROLES = {1: "prompt", 2: "answer"}
MODALITIES = {0: "text", 1: "image"}


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
