from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmfuse.data import open_source

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def image_bytes(
    mode: str = "L", size: tuple[int, int] = (4, 4), kind: str = "PNG", color: Any = 7, **how: Any
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **how)
    return file.getvalue()


PNG = image_bytes()


def texts(source: Any) -> list[str]:
    return [sample.text for sample in source]


def refused(path: Path | str, error: type[Exception] = ValueError, **how: Any) -> str:
    with pytest.raises(error) as raised:
        open_source(path, **how)
    return str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "cat.png").write_bytes(PNG)
    (tmp_path / "images" / "dog.png").write_bytes(image_bytes(color=9))
    return tmp_path


def write_json(folder: Path, *records: Any, name: str = "data.json") -> Path:
    if name.endswith("l"):
        (folder / name).write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), "utf-8")
    else:
        (folder / name).write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_the_formats_of_records_mean_the_same(name: str, folder: Path) -> None:
    question, answer = "<image>\nWhat is this? ö", "A cat."
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    source = open_source(
        write_json(
            folder,
            {
                "id": "1",
                "image": "cat.png",
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                ],
            },
            {"messages": [{"role": "user", "content": parts}], "images": ["images/dog.png"], "family": ["x"]},
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "./cat.png"},
                            {"type": "image", "path": "images/dog.png"},
                        ],
                    }
                ]
            },
            {"text": "<image>ü", "images": "images/../cat.png"},
            {"text": "no image"},
            name=name,
        )
    )
    assert [sample.key for sample in source] == [f"{name}[{number}]" for number in range(5)]
    first, second, third, fourth, fifth = source
    assert first.messages == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    assert first.text is None and first.info == {"id": "1"}
    assert second.messages == ({"role": "user", "content": parts},) and second.info == {"family": ["x"]}
    assert fourth.text == "<image>ü" and fourth.messages is None
    assert fifth.images == ()
    values = [[int(np.asarray(image)[0, 0]) for image in sample.images] for sample in (first, second, third, fourth)]
    assert values == [[7], [9], [7, 9], [7]]


def test_one_record_blank_lines_and_a_byte_order_mark_are_fine(folder: Path) -> None:
    (folder / "one.json").write_text(json.dumps(CHAT, indent=2))
    assert len(open_source(folder / "one.json")) == 1
    lines = b"\xef\xbb\xbf\r\n" + "".join(f'{{"text": "ä{n}"}}\r\n\r\n' for n in range(3)).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    assert texts(open_source(folder / "lines.jsonl")) == ["ä0", "ä1", "ä2"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), st.booleans())
def test_any_text_is_read_back(written: list[str], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        records = [{"text": text} for text in written]
        Path(scratch, "a.json").write_text(json.dumps(records, ensure_ascii=ascii_only), "utf-8")
        lines = "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in records)
        Path(scratch, "a.jsonl").write_bytes(lines.encode())
        assert texts(open_source(Path(scratch, "a.json"))) == written
        assert texts(open_source(Path(scratch, "a.jsonl"))) == written


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"},\n {"text": }]', ", line 2: unreadable JSON: Expecting value (column 11)"),
        (b'[{"text": "a"}\n {"text": "b"}]', ", line 2: unreadable JSON: expected ',' or ']' after a record"),
        (b'[{"text": "a"},\n', ", line 2: unreadable JSON: Expecting value"),
        (b'[{"text": "a"}\n', ", line 2: unreadable JSON: expected ',' or ']' after a record"),
        (b'[{"text": "a"}]\n\n[]', ", line 3: unreadable JSON: text after the end of the list"),
        (b'{"text": "a"}\n{"text": "b"\n', ", line 3: unreadable JSON: Expecting ',' delimiter"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ", line 2: not UTF-8 (invalid start byte)"),
        (b"", " holds no samples"),
        (b" [ ] ", " holds no samples"),
    ],
)
def test_unreadable_json_is_named_with_its_line(data: bytes, message: str, folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(data)
    assert refused(folder / "a.jsonl").startswith(f"{folder / 'a.jsonl'}{message}")


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (3, ": a record is an object with one of messages, conversations, text, got 3"),
        ({}, ": expected one of messages, conversations, text; the record has no keys"),
        ({"id": 1, "caption": "x"}, ": expected one of messages, conversations, text; the record has id, caption"),
        (
            {"text": "x", "messages": [USER]},
            ": expected one of messages, conversations, text; the record has text, messages",
        ),
        ({"text": None}, ": 'text' must be a string, got None"),
        ({"messages": []}, ": 'messages' must be a list with at least one message, got a list of 0"),
        ({"messages": {"a": 1}}, ": 'messages' must be a list with at least one message, got an object with a"),
        (
            {"messages": [USER, {"role": "user"}]},
            ": messages[1]: expected {'role': ..., 'content': text or parts}, got an",
        ),
        (
            {"messages": [{"role": "asistant", "content": ""}]},
            ": messages[0]: unknown message role 'asistant': did you mean",
        ),
        ({"messages": [{"role": "user", "content": None}]}, ": messages[0]: expected {'role': ..., 'content': text or"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, ": messages[0]: unknown content part 'x'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            ": messages[0]: unknown content part 'video'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            ": messages[0]: a content part of type 'text' needs",
        ),
        ({"conversations": ["x"]}, ": conversations[0]: expected {'from': 'human' | 'gpt' | 'system', 'value': text}"),
        ({"conversations": [{"from": "human", "value": 1}]}, ": conversations[0]: expected {'from': 'human'"),
        (
            {"conversations": [{"from": "humman", "value": ""}]},
            ": conversations[0]: unknown speaker 'humman': did you mean",
        ),
        ({"text": "x", "video": "v.mp4"}, ": the record has 'video', which is not read; samples hold text, image,"),
        ({"text": "x", "image": "a.png", "images": ["b.png"]}, ": images are named twice"),
        ({"text": "x", "images": [1]}, ": images must be file names, got [1]"),
        ({"text": "x", "images": {"path": "a.png"}}, ": images must be file names, got {'path': 'a.png'}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "images": ["a.png"]},
            ": images are named twice; give them in one of 'image', 'images' and content parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image"}]}]},
            ": images must be file names, got ['a.png', None]",
        ),
        (
            {"text": "x", "image": "https://a.org/b.png"},
            ": the image 'https://a.org/b.png' is a URL; images are read from",
        ),
        ({"text": "x", "image": "data:image/png;base64,AA"}, ": the image 'data:image/png;base64,AA' is a URL"),
        ({"text": "x", "image": "../cat.png"}, ": the image '../cat.png' lies outside of the folder of images"),
        (
            {"text": "x", "image": "images/../../cat.png"},
            ": the image 'images/../../cat.png' lies outside of the folder",
        ),
        ({"text": "x", "image": "/etc/passwd"}, ": the image '/etc/passwd' lies outside of the folder of images"),
        ({"text": "x", "image": "."}, ": the image '.' lies outside of the folder of images"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_on_opening(raw: Any, message: str, folder: Path) -> None:
    path = write_json(folder, {"text": "fine"}, raw)
    assert refused(path).startswith(f"{path}[1]{message}")


def test_images_may_lie_elsewhere(folder: Path) -> None:
    path = write_json(
        folder,
        {"text": "<image>", "image": "dog.png"},
        {"text": "<image>", "image": str(folder / "images" / "dog.png")},
    )
    source = open_source(path, images=folder / "images")
    assert [int(np.asarray(sample.images[0])[0, 0]) for sample in source] == [9, 9]
    assert "there is no such folder of images" in refused(path, FileNotFoundError, images=folder / "nowhere")


def test_missing_and_damaged_images_are_named(folder: Path) -> None:
    (folder / "torn.png").write_bytes(PNG[:40])
    source = open_source(
        write_json(folder, *({"text": "<image>", "image": name} for name in ("no.png", "images", "torn.png")))
    )
    with pytest.raises(FileNotFoundError, match=rf"^data.json\[0\]: there is no image {folder}/no.png"):
        source[0]
    with pytest.raises(OSError, match=rf"data.json\[1\]: cannot read the image {folder}/images: "):
        source[1]
    with pytest.raises(ValueError, match=rf"^data.json\[2\], {folder}/torn.png: cannot read this image: "):
        source[2]
