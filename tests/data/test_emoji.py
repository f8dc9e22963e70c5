"""Emoji as questions: from tiny packages to chats that the readers of training data take."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfuse.data import emoji, open_source
from mmfuse.errors import DataError

#: Name, code points, category, group; of the last three only `bus` is used.
TABLE = [
    ("cat", "1F408", "Animals & Nature", "animal-mammal"),
    ("dog", "1F415", "Animals & Nature", "animal-mammal"),
    ("owl", "1F989", "Animals & Nature", "animal-bird"),
    ("apple", "1F34E", "Food & Drink", "food-fruit"),
    ("key", "1F511", "Objects", "lock"),
    ("bus", "1F68C-FE0F", "Travel & Places", "transport-ground"),
    ("red_car", "1F697", "Travel & Places", "transport-ground"),
    ("grin", "1F601", "Smileys & Emotion", "face-smiling"),
]
COLOURS = {"google": "red", "twitter": "green", "openmoji": "blue", "fluent": "yellow"}


def picture(artist: str) -> bytes:
    """A disc of the artist's colour on nothing."""
    if artist == "openmoji":
        pytest.importorskip("resvg_py", reason="needs resvg-py")
        square = '<rect x="3" y="3" width="3" height="3" fill="blue"/>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{square}</svg>'.encode()
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(COLOURS[artist], (20, 20, 44, 44))
    file = io.BytesIO()
    image.save(file, "WEBP" if artist == "fluent" else "PNG", lossless=True)
    return file.getvalue()


def write_package(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    rows = [
        {"short_name": name, "unified": code, "category": category, "subcategory": group}
        for name, code, category, group in TABLE
    ]
    for name, artist in emoji.ARTISTS.items():
        files = {artist.file(code.lower()): picture(name) for _, code, _, _ in TABLE}
        files |= {"package/emoji.json": json.dumps(rows).encode()} if name == "google" else {}
        write_package(folder / f"{artist.package}-1.0.0.tgz", files)
    return folder


def chats(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(chat: dict[str, Any]) -> tuple[str, str]:
    user, assistant = chat["messages"]
    return user["content"].removeprefix("<image>"), assistant["content"]


def test_artists_and_concepts_are_held_out(packages: Path, tmp_path: Path) -> None:
    emoji.write_pictures(packages, tmp_path / "out", concepts=6, new=2)
    train, test = chats(tmp_path / "out" / "instruct.jsonl"), chats(tmp_path / "out" / "test.jsonl")
    captions = chats(tmp_path / "out" / "align.jsonl")
    taught = {chat["images"][0] for chat in train}
    assert taught == {chat["images"][0] for chat in captions}
    assert all("-fluent" not in name for name in taught)
    assert all("-fluent.png" in chat["images"][0] for chat in test)
    trained = {chat["text"].removeprefix("<image>") for chat in captions}
    assert len(trained) == 4 and trained < {"cat", "dog", "owl", "apple", "key", "bus"}
    for chat in test:
        concept = chat["images"][0].removeprefix("images/").removesuffix("-fluent.png")
        assert chat["family"].endswith("_new") == (concept not in trained)
    assert all(chat in train for chat in chats(tmp_path / "out" / "val.jsonl"))


def test_answers_are_true(packages: Path, tmp_path: Path) -> None:
    emoji.write_pictures(packages, tmp_path / "out", concepts=6, new=2)
    kinds = {"cat": "animal", "dog": "animal", "owl": "animal", "apple": "food", "bus": "vehicle"}
    counts = Counter[str]()
    for chat in chats(tmp_path / "out" / "test.jsonl") + chats(tmp_path / "out" / "instruct.jsonl"):
        concept = chat["images"][0].removeprefix("images/").split("-")[0]
        question, answer = asked(chat)
        family = chat["family"].removesuffix("_new")
        counts[answer if family == "yes_no" else family] += 1
        if family == "name":
            assert (question, answer) == ("What is this?", concept)
        elif family == "kind":
            assert answer == kinds[concept]
        else:
            assert answer == ("yes" if question == f"Is this {concept}?" else "no")
    assert counts["yes"] == counts["no"] == counts["name"] == 4 * 4 + 2
    assert 0 < counts["kind"] < counts["name"]  # a key has no kind that is asked for


def test_pictures_are_small_square_and_on_white(packages: Path, tmp_path: Path) -> None:
    emoji.write_pictures(packages, tmp_path / "out", concepts=6, new=2)
    for artist, colour in COLOURS.items():
        image = Image.open(next((tmp_path / "out" / "images").glob(f"*-{artist}.png")))
        assert (image.size, image.mode) == ((emoji.SIZE, emoji.SIZE), "RGB")
        assert image.getpixel((1, 1)) == (255, 255, 255)
        assert image.getpixel((24, 24)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    source = open_source(tmp_path / "out" / "test.jsonl")
    assert len(source[0].images) == 1


def test_the_same_seed_gives_the_same_files(packages: Path, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        emoji.write_pictures(packages, tmp_path / folder, concepts=6, new=2, seed=seed)
    a, b, c = ((tmp_path / folder / "test.jsonl").read_text() for folder in "abc")
    assert a == b != c


def test_what_is_missing_is_named(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="6 concepts in common, 7 are asked for"):
        emoji.write_pictures(packages, tmp_path / "out", concepts=7)
    twitter = packages / "emoji-datasource-twitter-1.0.0.tgz"
    write_package(twitter, {"package/readme": b""})
    with pytest.raises(DataError, match=r"none of the expected files, such as package/img/twitter/64/1f408\.png"):
        emoji.write_pictures(packages, tmp_path / "out")
    twitter.write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read"):
        emoji.write_pictures(packages, tmp_path / "out")
    twitter.unlink()
    with pytest.raises(DataError, match=r"no emoji-datasource-twitter-\*\.tgz here; `npm pack` writes it"):
        emoji.write_pictures(packages, tmp_path / "out")
