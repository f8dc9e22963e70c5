from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmfuse.data import Sample, encode_sample, open_source, split_answer
from mmfuse.data.handwriting_shards import Handwriting, samples, write_shards
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.models.chat import ChatEncoder, ChatFormat
from mmfuse.sequence import Modality, Role

VISUAL_TOKENS = 3
QUESTION = {"role": "user", "content": "<image>\nRead all digits."}
ANSWER = {"role": "assistant", "content": "12 34"}


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_tokenizer(), ChatFormat(), {"image": VISUAL_TOKENS})


def chat(*messages: dict, images: int = 1, key: str = "a.tar:0") -> Sample:
    return Sample(key, tuple(np.zeros((8, 8), np.uint8) for _ in range(images)), messages, None, {})


def document(text: str, images: int = 1, key: str = "a.tar:0") -> Sample:
    return Sample(key, tuple(np.zeros((8, 8), np.uint8) for _ in range(images)), None, text, {})


def test_a_chat_is_encoded_with_its_key_and_its_answer_is_taught(encoder: ChatEncoder) -> None:
    encoded = encode_sample(chat(QUESTION, ANSWER), encoder)
    assert encoded.key == "a.tar:0" and len(encoded.images) == 1
    assert (encoded.table[0] == Modality.IMAGE).sum() == VISUAL_TOKENS
    answer = encoded.input_ids[encoded.table[1] == Role.ANSWER]
    assert load_tokenizer().decode(answer) == "12 34<|end|>"


def test_generation_ends_with_the_header_of_an_answer(encoder: ChatEncoder) -> None:
    encoded = encode_sample(chat(QUESTION), encoder, generation=True)
    assert load_tokenizer().decode(encoded.input_ids).endswith("<|assistant|>")
    assert not (encoded.table[1] == Role.ANSWER).any()


def test_a_document_is_all_answer_but_for_its_image(encoder: ChatEncoder) -> None:
    encoded = encode_sample(document("<image>12 34"), encoder)
    assert load_tokenizer().decode(encoded.input_ids[encoded.table[1] == Role.ANSWER]) == "12 34<|end|>"


def test_a_document_without_text_is_encoded(encoder: ChatEncoder) -> None:
    assert len(encode_sample(document("", images=0), encoder)) == 2  # begin and end


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (chat(QUESTION, images=2), "a.tar:0: 1 <image> placeholders in the text but 2 images"),
        (document("a caption"), "a.tar:0: 0 <image> placeholders in the text but 1 images"),
        (
            chat({"role": "asistant", "content": "x"}, images=0),
            "a.tar:0: unknown message role 'asistant': did you mean",
        ),
        (chat({"role": "user"}, images=0), "a.tar:0: a message or content part lacks 'content'"),
        (chat({"role": "user", "content": [{"type": "video"}]}, images=0), "a.tar:0: unknown content part 'video'"),
    ],
)
def test_what_cannot_be_encoded_is_named(sample: Sample, message: str, encoder: ChatEncoder) -> None:
    with pytest.raises(ValueError) as raised:
        encode_sample(sample, encoder)
    assert str(raised.value).startswith(message)


def test_a_document_cannot_be_generated_from(encoder: ChatEncoder) -> None:
    with pytest.raises(ValueError, match=r"^a.tar:0: generation needs messages"):
        encode_sample(document("<image>"), encoder, generation=True)


@pytest.mark.parametrize(("messages", "text"), [(None, None), ((QUESTION,), "text")])
def test_a_sample_has_either_messages_or_text(messages: tuple | None, text: str | None) -> None:
    with pytest.raises(ValueError, match=r"^k: a sample has either messages or a text"):
        Sample("k", (), messages, text, {})


pieces = st.lists(
    st.sampled_from(["<image>", "Read all digits.", " ", "\n", "12", "<imag", "e>", "<", "é"]), max_size=12
)


@given(turns=st.lists(pieces, min_size=1, max_size=4), as_parts=st.booleans(), off=st.sampled_from([-1, 0, 1]))
def test_placeholders_and_images_must_agree_in_number(
    encoder: ChatEncoder, turns: list[list[str]], as_parts: bool, off: int
) -> None:
    count = "".join(f"{''.join(turn)}\0" for turn in turns).count("<image>")
    if as_parts:
        parts = [[{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in turn] for turn in turns]
        messages = [{"role": "user", "content": part} for part in parts]
    else:
        messages = [{"role": "user", "content": "".join(turn)} for turn in turns]
    sample = chat(*messages, images=max(0, count + off))
    if len(sample.images) == count:
        encoded = encode_sample(sample, encoder)
        assert (encoded.table[0] == Modality.IMAGE).sum() == count * VISUAL_TOKENS
        segments = encoded.table[2][encoded.table[0] == Modality.IMAGE]
        assert len(set(segments.tolist())) == count  # neighbours stay apart
    else:
        with pytest.raises(
            ValueError, match=rf"{count} <image> placeholders in the text but {len(sample.images)} images"
        ):
            encode_sample(sample, encoder)


def test_split_answer_leaves_the_question() -> None:
    sample = chat(QUESTION, ANSWER, {"role": "user", "content": "Again?"}, {"role": "assistant", "content": "yes"})
    question, answer = split_answer(sample)
    assert answer == "yes"
    assert question.messages == sample.messages[:3]
    assert (question.key, question.images, question.info) == (sample.key, sample.images, sample.info)


def test_split_answer_joins_parts() -> None:
    parts = [{"type": "text", "text": "12 "}, {"type": "text", "text": "34"}]
    assert split_answer(chat(QUESTION, {"role": "assistant", "content": parts}))[1] == "12 34"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (document("<image>x"), "a.tar:0: a document has no answer to split off"),
        (chat(ANSWER, QUESTION), "a.tar:0: the last message must be the assistant's, its role is 'user'"),
        (chat(), "a.tar:0: the last message must be the assistant's, its role is missing"),
        (
            chat(QUESTION, {"role": "assistant", "content": [{"type": "image"}]}),
            "a.tar:0: the last answer holds <image>",
        ),
    ],
)
def test_split_answer_names_what_has_none(sample: Sample, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        split_answer(sample)
    assert str(raised.value).startswith(message)


def test_an_answer_may_say_what_is_no_placeholder_here() -> None:
    tag = {"role": "assistant", "content": "the tag <audio>"}
    assert split_answer(chat(QUESTION, tag))[1] == "the tag <audio>"
    heard = Sample("k", (), (QUESTION, tag), None, {}, audio=("clip",))
    with pytest.raises(ValueError, match="k: the last answer holds <audio>; answers are compared as text"):
        split_answer(heard)


@pytest.mark.parametrize("part", ["align", "instruct", "val", "test"])
def test_handwriting_is_read_as_it_was_made(part: str, tmp_path: Path, encoder: ChatEncoder) -> None:
    spec = Handwriting(align=12, instruct=20, turns=5, val=28, test=42, shift=0.5, gain=0.3, per_shard=16)
    write_shards(tmp_path / "shards", spec)
    source = open_source(tmp_path / "shards" / f"{part}-*.tar")
    made = list(samples(spec, part))
    assert len(source) == len(made)
    for index, one in enumerate(made):
        read = source[index]
        assert read.key == f"{part}-{index // 16:04d}.tar:{one['key']}"
        assert [image.mode for image in read.images] == ["L"]
        np.testing.assert_array_equal(np.asarray(read.images[0]), one["images"][0])
        assert read.text == one.get("text")
        assert list(read.messages or ()) == one.get("messages", [])
        assert read.info == {name: one[name] for name in ("family", "targets", "digits", "scans") if name in one}
        encode_sample(read, encoder)
        if part != "align":
            assert split_answer(read)[1] == one["targets"][-1]


def test_the_three_ways_to_write_a_sample_encode_alike(tmp_path: Path, encoder: ChatEncoder) -> None:
    png = io.BytesIO()
    Image.new("L", (8, 8), 7).save(png, "PNG")
    (tmp_path / "cat.png").write_bytes(png.getvalue())
    llava = {
        "id": "1",
        "image": "cat.png",
        "conversations": [
            {"from": "human", "value": QUESTION["content"]},
            {"from": "gpt", "value": ANSWER["content"]},
        ],
    }
    messages = {"messages": [QUESTION, ANSWER], "images": ["cat.png"]}
    (tmp_path / "llava.json").write_text(json.dumps([llava]))
    (tmp_path / "chat.jsonl").write_text(json.dumps(messages) + "\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, data in (
            ("0.png", png.getvalue()),
            ("0.json", json.dumps({"messages": [QUESTION, ANSWER]}).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    encoded = [
        encode_sample(open_source(tmp_path / name)[0], encoder) for name in ("llava.json", "chat.jsonl", "shard.tar")
    ]
    for other in encoded[1:]:
        np.testing.assert_array_equal(other.input_ids, encoded[0].input_ids)
        np.testing.assert_array_equal(other.table, encoded[0].table)
        np.testing.assert_array_equal(np.asarray(other.images[0]), np.asarray(encoded[0].images[0]))
