from __future__ import annotations

import gc
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from mmfuse.data import open_source
from mmfuse.data.handwriting_shards import Handwriting, write_shards
from mmfuse.data.sources import expand_braces
from mmfuse.data.sources.files import MAX_OPEN
from mmfuse.data.sources.undecoded import Undecoded
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


def test_a_folder_a_file_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_tar(tmp_path / "shards" / f"train-{number:04d}.tar", documents(str(number)))
    monkeypatch.chdir(tmp_path)
    every = [str(number) for number in range(12)]
    assert texts(open_source("shards")) == every
    assert texts(open_source("./shards/train-*.tar")) == every
    assert texts(open_source("shards/train-000[12].tar")) == ["1", "2"]
    assert texts(open_source("shards/train-{0008..0011}.tar")) == ["8", "9", "10", "11"]
    assert texts(open_source("shards/train-{0011,0003}.tar")) == ["11", "3"]
    assert texts(open_source("shards/train-00{0,1}{0..1}.tar")) == ["0", "1", "10", "11"]
    assert texts(open_source("shards/train-0007.tar")) == ["7"]
    assert texts(open_source("shards/train-{000,001}*.tar")) == every


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{0..10}", [str(number) for number in range(11)]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("a{", "braces do not match"), ("a}{0..3}", "braces do not match")],
)
def test_wrong_braces_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        expand_braces(pattern)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        write_tar(tmp_path / f"train-{number}.tar", documents("x"))
    assert refused(tmp_path / "train-{0..3}.tar", FileNotFoundError).endswith(
        f"there is no shard {tmp_path}/train-2.tar"
    )
    assert refused(tmp_path / "val-*.tar", FileNotFoundError).endswith(f"no file matches {tmp_path}/val-*.tar")
    assert refused(tmp_path / "val.tar", FileNotFoundError).endswith("val.tar: there is no such file or folder")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("pipe:cat a.tar", "pipe: is not allowed: it would run a command"),
        ("file:///a.tar", "file: is not allowed: sources are local files, or http, https, s3, gs"),
        ("https://a.org/a.json", "URLs name .tar shards"),
    ],
)
def test_urls_are_refused(url: str, says: str) -> None:
    assert says in refused(url)


def test_a_folder_without_one_source_is_refused(folder: Path) -> None:
    assert refused(folder).endswith(
        "expected .tar shards or one .json or .jsonl file in this folder, found none of them"
    )
    write_json(folder, CHAT, name="a.json")
    assert len(open_source(folder)) == 1
    write_json(folder, CHAT, name="b.jsonl")
    assert refused(folder).endswith("found several: a.json, b.jsonl")


def test_other_kinds_of_files_are_refused(folder: Path) -> None:
    assert refused(folder / "cat.png").endswith(
        "cat.png: unknown kind of data; expected .tar, .json, .jsonl or .parquet"
    )
    (folder / "a.tar.gz").write_bytes(b"")
    assert refused(folder / "a.tar.gz").endswith("compressed shards cannot be read at random, unpack them to .tar")
    assert "patterns name .tar shards, and" in refused(folder / "*.png")
    write_tar(folder / "a.tar", documents("x"))
    assert refused(folder / "{a,a}.tar").endswith("names a shard twice")
    assert "shards hold their images" in refused(folder / "a.tar", images=folder)


@pytest.fixture(scope="module")
def handwriting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handwriting") / "shards"
    write_shards(folder, Handwriting(align=40, instruct=24, turns=3, val=7, test=7, per_shard=16))
    return folder


def test_the_manifest_is_kept_to(handwriting: Path, tmp_path: Path) -> None:
    assert f"name one of them: {handwriting}/align-*.tar, {handwriting}/instruct-*.tar" in refused(handwriting)
    copy = tmp_path / "copy"
    shutil.copytree(handwriting, copy)
    (copy / "align-0001.tar").unlink()
    message = "manifest.json lists align-0001.tar, and there is no such shard"
    assert refused(copy / "align-*.tar", FileNotFoundError).endswith(message)
    assert len(open_source(copy / "align-0000.tar")) == 16
    assert len(open_source(copy / "instruct-*.tar")) == 24
    with (copy / "val-0000.tar").open("ab") as file:
        file.write(bytes(512))
    assert "bytes, its manifest says" in refused(copy / "val-*.tar")
    (copy / "manifest.json").write_text('{"parts": ["another kind"]}')
    assert len(open_source(copy / "val-*.tar")) == 7
    (copy / "manifest.json").write_text("{")
    assert "manifest.json: unreadable JSON: " in refused(copy / "val-*.tar")


def test_fingerprints_tell_data_and_not_places(handwriting: Path, tmp_path: Path) -> None:
    shutil.copytree(handwriting, tmp_path / "moved")
    here, moved = (open_source(place / "align-*.tar") for place in (handwriting, tmp_path / "moved"))
    assert here.fingerprint() == moved.fingerprint()
    assert here.fingerprint() != open_source(handwriting / "align-0000.tar").fingerprint()
    (tmp_path / "moved" / "manifest.json").unlink()
    assert here.fingerprint() != open_source(tmp_path / "moved" / "align-*.tar").fingerprint()
    first = open_source(write_json(tmp_path, {"text": "a"})).fingerprint()
    assert first == open_source(write_json(tmp_path, {"text": "a"})).fingerprint()
    assert first != open_source(write_json(tmp_path, {"text": "b"})).fingerprint()


# Processes and files


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(handwriting: Path, tmp_path: Path) -> None:
    gc.collect()
    before = open_files()
    source = open_source(handwriting / "align-*.tar")
    assert open_files() == before
    assert len(list(source)) == 40 and open_files() == before + 3
    with pytest.raises(ValueError):
        open_source(write_tar(tmp_path / "bad.tar", [("a.png", PNG)]))
    del source
    gc.collect()
    assert open_files() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    for number in range(MAX_OPEN + 20):
        write_tar(tmp_path / f"{number:03d}.tar", documents(str(number)))
    before = open_files()
    source = open_source(tmp_path)
    for _ in range(2):
        assert texts(source) == [str(number) for number in range(MAX_OPEN + 20)]
        assert open_files() <= before + MAX_OPEN


@pytest.mark.parametrize("kind", ["shards", "json"])
def test_a_copy_in_another_process_reads_the_same(kind: str, handwriting: Path, folder: Path) -> None:
    path = handwriting / "align-*.tar" if kind == "shards" else write_json(folder, {"text": "a"}, {"text": "b"})
    source = open_source(path)
    expected = texts(source)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301  # safe: pickled on this line
    assert texts(copy) == expected and copy.fingerprint() == source.fingerprint()


@pytest.mark.slow
def test_reading_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 samples are indexed within 1.5 s, and a sample is read within 0.25 ms."""
    monkeypatch.setenv("MMFUSE_CACHE", str(tmp_path / "cache"))
    members = [part for n in range(20_000) for part in ((f"{n:06d}.0.png", PNG), (f"{n:06d}.json", record()))]
    path = write_tar(tmp_path / "a.tar", members)
    begin = time.perf_counter()
    source = open_source(path)
    indexed = time.perf_counter()
    assert len(source) == 20_000
    for index in range(0, 20_000, 10):
        source[index]
    assert indexed - begin < 1.5
    assert time.perf_counter() - indexed < 0.00025 * 2000


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_an_image_is_known_before_it_is_decoded(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.new("RGB", (5, 3)).save(file, "JPEG", exif=exif)
    image = Undecoded(file.getvalue, "jpg", "a.jpg")
    assert image.size == image.decode().size == ((5, 3) if orientation < 5 else (3, 5))
    with pytest.raises(DataError, match=r"b\.jpg: cannot read this image"):
        _ = Undecoded(lambda: b"no image", "jpg", "b.jpg").size
