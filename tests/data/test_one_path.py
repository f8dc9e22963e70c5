"""Whatever a source holds is decoded by the one table, within its budget; nothing else in the package decodes."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import mmfuse
from mmfuse.data import open_source
from mmfuse.data.decoders import Budget
from mmfuse.data.quarantine import retried
from mmfuse.errors import DataError, SourceError

#: What turns bytes into media or runs what is in them.
_DECODING = re.compile(r"Image\.open\(|soundfile\.|read_array|safetensors\.torch import load\b|pickle\.load|gzip\.")


def picture(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_nothing_else_decodes() -> None:
    root = Path(mmfuse.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if _DECODING.search(path.read_text())}
    # A checkpoint of open_clip is no sample; the payloads of `mmfuse chaos` are made and not read; artwork of packages
    # keeps its transparency until it is on white paper.
    no_samples = {"models/encoders/openclip.py", "training/chaos/payloads.py"}
    artwork = {"data/emoji.py", "eval/tasks/pictures.py"}
    assert found - no_samples - artwork == {"data/decoders.py"}


def shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(folder / "a.tar"), mtime=0, encoder=False) as writer:
        for number in range(4):
            writer.write({"__key__": f"{number}", "png": picture(), "json": b'{"text": "<image>%d"}' % number})
    return folder / "a.tar"


def json_file(folder: Path) -> Path:
    (folder / "a.png").write_bytes(picture())
    (folder / "a.json").write_text(json.dumps([{"text": "<image>1", "image": "a.png"}]))
    return folder / "a.json"


def pictures(folder: Path) -> Path:
    (folder / "own").mkdir()
    (folder / "own" / "a.png").write_bytes(picture())
    (folder / "own" / "a.txt").write_text("a caption")
    return folder / "own"


def parquet(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"text": "<image>1", "image": {"bytes": picture(), "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("make", [shards, json_file, pictures, parquet])
@pytest.mark.parametrize("budget", [Budget(pixels=63), Budget(bytes=20)])
def test_budget_holds_for_every_kind_of_source(make: Callable[[Path], Path], budget: Budget, tmp_path: Path) -> None:
    path = make(tmp_path)
    assert open_source(path)[0].images[0].size == (8, 8)
    with pytest.raises(DataError, match=r"64 pixels, more than the limit of 63|bytes, more than the limit of 20"):
        open_source(path, budget=budget)[0]


def test_what_is_too_large_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(shards(tmp_path), budget=Budget(bytes=60))
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: sizes.append(size) or pread(fd, size, at))
    with pytest.raises(DataError, match="more than the limit of 60"):
        source[0]
    assert sizes and max(sizes) <= 60
    path = json_file(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(DataError, match="more than the limit of 60"):
        sample = open_source_of(path, Budget(bytes=60))
        sample.images[0].read()


def open_source_of(path: Path, budget: Budget) -> Any:
    from mmfuse.data.sources.json_files import sample_of_record

    return sample_of_record({"text": "<image>1", "image": "a.png"}, "k", path.parent, budget)


def test_failures_of_files_beside_a_json_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = open_source(json_file(tmp_path)).read(0)
    read, failures = Path.read_bytes, [OSError(5, "Input/output error")] * 2
    monkeypatch.setattr(Path, "read_bytes", lambda self: raise_(failures.pop()) if failures else read(self))
    assert retried(sample.images[0].read, "k", wait=0) == picture() and not failures


def raise_(error: Exception) -> Any:
    raise error


def samples_of(source: Any) -> list[tuple[Any, ...]]:
    return [(one.text, one.messages, [np.asarray(image).tolist() for image in one.images]) for one in source]


def test_every_block_of_a_shard_of_webdataset_is_missed(tmp_path: Path) -> None:
    """Before it is indexed, and while it is read."""
    path = shards(tmp_path / "whole")
    whole, expected = path.read_bytes(), samples_of(open_source(path))
    cut = tmp_path / "cut.tar"
    lossless = 0
    for size in range(0, len(whole), 512):
        cut.write_bytes(whole[:size])
        try:
            assert samples_of(open_source(cut)) == expected, size
            lossless += 1
        except DataError as error:
            assert "cut.tar" in str(error), size
        cut.write_bytes(whole)
        source = open_source(cut)
        source[0]  # the file is open from here on
        os.truncate(cut, size)
        try:
            assert samples_of(source) == expected, size
        except SourceError as error:  # ends the run: no matter of one sample
            assert "cut.tar" in str(error), size
    assert lossless == (len(whole) - len(whole.rstrip(b"\0"))) // 512 - 1 or lossless > 0


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../evil"])
def test_names_that_lead_out_of_a_folder_are_only_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    write(path, (f"{name}.json", b'{"text": "x"}'))
    assert open_source(path)[0].text == "x"
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a.tar", "in"]


@pytest.mark.parametrize(
    "image", ["../a.png", "/etc/passwd", "file:///etc/passwd", "pipe:touch x", "http://a.org/a.png"]
)
def test_records_name_no_file_elsewhere(image: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "in" / "a.json").write_text(json.dumps([{"text": "<image>", "image": image}]))
    with pytest.raises((DataError, FileNotFoundError)):
        open_source(tmp_path / "in" / "a.json")[0]


def write(path: Path, *members: Sequence[Any]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
