from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmfuse.data import open_source
from mmfuse.data.sources import shards
from mmfuse.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def image_bytes(
    mode: str = "L", size: tuple[int, int] = (4, 4), kind: str = "PNG", color: Any = 7, **how: Any
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **how)
    return file.getvalue()


PNG = image_bytes()


def record(**fields: Any) -> bytes:
    return json.dumps(fields or CHAT).encode()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5 if tar_format == tarfile.PAX_FORMAT else 1  # webdataset's writer makes such pax headers
            tar.addfile(info, io.BytesIO(data))
    return path


def documents(*texts: str) -> list[tuple[str, bytes]]:
    return [(f"{number:03d}.json", record(text=text)) for number, text in enumerate(texts)]


def texts(source: Any) -> list[str]:
    return [sample.text for sample in source]


def refused(path: Path | str, error: type[Exception] = ValueError, **how: Any) -> str:
    with pytest.raises(error) as raised:
        open_source(path, **how)
    return str(raised.value)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_kinds_of_tar_are_read(tar_format: int, tmp_path: Path) -> None:
    names = ["short", "folder/in a folder", "ü", "d" * 60 + "/" + "n" * 90]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append("l" * 300)
    members = [
        part for name in names for part in ((f"{name}.png", PNG), (f"{name}.json", record(text=f"<image>{name}")))
    ]
    source = open_source(write_tar(tmp_path / "a.tar", members, tar_format))
    assert [sample.key for sample in source] == [f"a.tar:{name}" for name in names]
    assert texts(source) == [f"<image>{name}" for name in names]
    assert np.asarray(source[0].images[0]).tolist() == [[7] * 4] * 4


def test_folders_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_bytes(record(text="one"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "data", arcname="./data")
    assert texts(open_source(tmp_path / "a.tar")) == ["one"]


def test_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    members = [(f"k.{number}.png", image_bytes(color=number)) for number in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)]
    source = open_source(write_tar(tmp_path / "a.tar", [*members, ("k.json", record(text="<image>" * 11))]))
    assert [np.asarray(image)[0, 0] for image in source[0].images] == list(range(11))


def test_a_caption_follows_its_image_and_json_beside_it_is_information(tmp_path: Path) -> None:
    members = [("k.jpg", image_bytes(kind="JPEG")), ("k.txt", b"a cat"), ("k.json", b'{"url": "u", "width": 4}')]
    sample = open_source(write_tar(tmp_path / "a.tar", members))[0]
    assert (sample.text, sample.info, len(sample.images)) == ("<image>a cat", {"url": "u", "width": 4}, 1)
    members = [("k.PNG", PNG), ("k.txt", "a cât: <image>".encode())]
    assert open_source(write_tar(tmp_path / "b.tar", members))[0].text == "a cât: <image>"


def test_indices_are_those_of_a_list(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", documents("a", "b"))
    write_tar(tmp_path / "1.tar", documents("c"))
    source = open_source(tmp_path)
    assert len(source) == 3 and texts(source) == ["a", "b", "c"] and source[-1].text == "c"
    for index in (3, -4):
        with pytest.raises(IndexError):
            source[index]


@given(cut=st.integers(1, 9 * 512 - 1))
def test_a_shard_that_was_cut_anywhere_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = write_tar(folder / "whole.tar", [*documents("b"), ("c.png", PNG), ("c.json", record())])
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512 + 1024)
    (folder / "short.tar").write_bytes(whole[: -min(cut, len(whole))])
    message = refused(folder / "short.tar")
    assert message.startswith(f"{folder / 'short.tar'} is truncated")


def test_every_block_that_is_cut_off_is_missed(tmp_path: Path) -> None:
    """At every multiple of 512 bytes, where a cut looks like an end: refused, unless only padding is gone."""
    path = write_tar(tmp_path / "whole.tar", [*documents("a", "b"), ("c.png", PNG), ("c.json", record())])
    whole = path.read_bytes()
    expected = texts(open_source(path))
    accepted = []
    for size in range(0, len(whole), 512):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        try:
            source = open_source(tmp_path / "cut.tar")
        except DataError as error:
            assert ("cut.tar" in str(error) and "byte" in str(error)) or "end marker is incomplete" in str(error)
        else:
            accepted.append(size)
            assert texts(source) == expected
    end = len(whole.rstrip(b"\0"))
    assert accepted and min(accepted) == -(-end // 512) * 512 + 1024, "both blocks of the end marker must be there"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where indices are stored, however small the shards."""
    monkeypatch.setenv("MMFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "_WORTH_STORING", 0)
    return tmp_path / "cache" / "shards"


def test_an_index_is_made_once(tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [*documents("a", "b"), ("c.png", PNG), ("c.json", record())])
    first = open_source(path)
    assert len(list(stored.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(shards, "members", lambda *_: pytest.fail("the shard was looked through again"))
        again = open_source(path)
        assert texts(again) == texts(first) and again.fingerprint() == first.fingerprint()
        assert [one.size for one in again[2].images] == [one.size for one in first[2].images]


def test_an_index_of_another_file_is_not_used(tmp_path: Path, stored: Path) -> None:
    path = write_tar(tmp_path / "a.tar", documents("a", "b"))
    before = open_source(path).fingerprint()
    stat = path.stat()
    write_tar(path, documents("c", "d"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert texts(open_source(path)) == ["c", "d"] and path.stat().st_size == stat.st_size
    assert open_source(path).fingerprint() != before, "the same table, other contents"
    path.write_bytes(path.read_bytes()[:1024])
    assert "is truncated" in refused(path)


def test_a_damaged_index_is_made_anew(tmp_path: Path, stored: Path) -> None:
    path = write_tar(tmp_path / "a.tar", documents("a", "b"))
    open_source(path)
    (place,) = stored.iterdir()
    good = place.read_bytes()
    for bad in (b"", b"no zip", good[:-40], bytes(200) + good[200:]):
        place.write_bytes(bad)
        assert texts(open_source(path)) == ["a", "b"]
        assert place.read_bytes() == good
    place.unlink()
    place.mkdir()
    assert texts(open_source(path)) == ["a", "b"], "a cache that cannot be written does no harm"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", PNG)], "a: images without a record; expected {key}.json or {key}.txt beside them"),
        (
            [("a.json", record()), ("a.cls", b"1")],
            "a: unknown member .cls; samples consist of .json or .txt, and images",
        ),
        ([("a.json", record()), ("a.pyd", b"")], "a: a member .pyd is refused: loading a pickle can run code"),
        ([("a.json", record()), ("a.x.pkl", b"")], "a: a member .x.pkl is refused: loading a pickle can run code"),
        ([("a.pth", b"")], "a: a member .pth is refused"),
        ([("a.npy", b"")], "a: a member .npy is refused"),
        ([("a.json.gz", b"")], "a: unknown member .json.gz"),
        ([*documents("a", "b"), ("000.png", PNG)], "000: the members of this key do not stand together, or it occurs"),
        ([("a.json", record()), ("a.json", record())], "a: two members are the same part of the sample"),
        ([("a.json", record()), ("a.png", PNG), ("a.0.jpg", PNG)], "a: two members are the same part of the sample"),
        ([("a.json", record()), ("a.0.png", PNG), ("a.2.png", PNG)], "a: images are numbered [0, 2]; expected [0, 1]"),
    ],
)
def test_a_shard_with_a_wrong_member_is_refused(members: list, message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    assert refused(path).startswith(f"{path}:{message}")


@pytest.mark.parametrize("name", ["README", ".DS_Store", "folder/.hidden"])
def test_a_member_without_key_is_refused(name: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"")])
    assert refused(path).startswith(f"{path}: member {name!r} has no key: members are named key.ending")


def test_links_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(link)
    assert refused(tmp_path / "a.tar").endswith("member 'a.json' is a symbolic link; shards hold plain files only")


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", documents("a", "b"))
    good = path.read_bytes()

    def message(data: bytes) -> str:
        path.write_bytes(data)
        return refused(path).removeprefix(f"{path} ")

    assert message(b"") == "is truncated: it ends at byte 0 without the end marker of a tar file"
    assert message(bytes(1024)).endswith("holds no samples")
    assert message(b"x" * 1024) == "is damaged or no tar file: no tar header at byte 0"
    assert message(good[:1024] + b"\xff" + good[1025:]) == "is damaged or no tar file: no tar header at byte 1024"
    assert message(zlib.compress(good, wbits=31)).startswith("is compressed with gzip; samples are read at random")
    assert message(good + good).startswith("goes on after its end marker at byte 2048: were two tar files joined")
    assert message(good[:2048] + bytes(512)) == "is truncated: its end marker is incomplete"


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_header_may_claim_any_size_but_must_be_right(tar_format: int, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.json")
    info.size = 1 << 40
    header = info.tobuf(tar_format)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    message = f"is truncated: member 'a.json' needs {(1 << 40) + len(header)} bytes, the file has {len(header) + 1024}"
    assert refused(tmp_path / "a.tar").endswith(message)


def test_a_negative_size_does_not_lead_backwards(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"-2000".ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    assert refused(tmp_path / "a.tar").endswith("is damaged: a member has -1024 bytes")


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            pixels = np.full((4, 4, 3), number, np.uint8)
            writer.write({"__key__": f"f/{number}", "0.png": pixels, "json": {"text": f"<image>{number}"}})
    source = open_source(tmp_path / "a.tar")
    assert [sample.key for sample in source] == ["a.tar:f/0", "a.tar:f/1", "a.tar:f/2"]
    assert [np.asarray(sample.images[0])[0, 0].tolist() for sample in source] == [[n] * 3 for n in range(3)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.json", b"{")], "a.tar:k: cannot read this .json: Expecting property name"),
        ([("k.json", b"\xff")], "a.tar:k: cannot read this .json: "),
        ([("k.txt", b"\xff")], "a.tar:k: cannot read this .txt: "),
        ([("k.txt", b" ")], "a.tar:k: the text is empty"),
        (
            [("k.json", b'{"id": 1, "caption": "x"}')],
            "a.tar:k: expected one of messages, conversations, text; the record",
        ),
        (
            [("k.json", record(text="x")), ("k.txt", b"y")],
            "a.tar:k: beside {key}.txt, {key}.json must be an object without",
        ),
        (
            [("k.json", record()), ("k.txt", b"y")],
            "a.tar:k: expected one of messages, conversations, text; the record has",
        ),
        (
            [("k.json", record(text="<image>", image="cat.jpg"))],
            "a.tar:k: the record names the image 'cat.jpg', but the",
        ),
        ([("k.json", record()), ("k.png", PNG[:40])], "a.tar:k, image 0: cannot read this image: "),
        ([("k.json", record()), ("k.png", b"GIF")], "a.tar:k, image 0: cannot read this image: "),
    ],
)
def test_a_sample_that_cannot_be_read_is_named(members: list, message: str, tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError) as raised:
        source[0]
    assert str(raised.value).startswith(message)


def test_a_shard_that_changes_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", documents("a"))
    source = open_source(path)
    write_tar(path, documents("b"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"a\.tar has changed since it was indexed"):
        source[0]
