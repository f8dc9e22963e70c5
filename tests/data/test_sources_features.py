"""Precomputed features in JSON data and in shards: read as numbers, refused by name, never unpickled."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mmfuse.data import open_source
from mmfuse.data.sources.undecoded import Undecoded
from mmfuse.models.media import Features

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


class Trap:
    """Raises when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the data was run')",)


def npy(array: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


TRAP = npy(np.array([Trap()], dtype=object), allow_pickle=True)


def write_json(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def decode(data: bytes, ending: str) -> Any:
    return Undecoded(lambda: data, ending, "x").decode()


def values(items: Sequence[Any]) -> list[list[list[float]]]:
    assert all(isinstance(item, Features) and item.values.dtype == np.float32 for item in items)
    return [item.values.tolist() for item in items]


# One file


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_float_dtype(dtype: Any, order: Any) -> None:
    assert values([decode(npy(np.asarray(VALUES, dtype, order)), "npy")]) == [VALUES.tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_of_any_float_dtype(dtype: torch.dtype) -> None:
    data = save({"features": torch.from_numpy(VALUES).to(dtype)})
    assert values([decode(data, "safetensors")]) == [VALUES.tolist()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TRAP, "x: the array holds pickled objects, which can run code"),
        (pickle.dumps(Trap()), "x: cannot read this .npy: "),
        (b"", "x: cannot read this .npy: "),
        (npy(VALUES)[:-1], "x: the header says 6 values of float32, 23 bytes follow"),
        (npy(VALUES) + b"\0", "x: the header says 6 values of float32, 25 bytes follow"),
        (npy(VALUES[0]), "x: features must be [V, D] (tokens, width), got shape [3]"),
        (npy(VALUES[:0]), "x: features must be [V, D] (tokens, width), got shape [0, 3]"),
        (npy(VALUES.astype(np.int8)), "x: features must be floating point, got int8"),
        (npy(VALUES.astype(np.complex64)), "x: features must be floating point, got complex64"),
        (npy(np.where(VALUES > 4, np.nan, VALUES)), "x: 1 of 6 features are NaN or infinite"),
    ],
)
def test_npy_that_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        decode(data, "npy")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(VALUES), "x: the header should have "),
        (save({"a": torch.ones(2, 3)})[:-1], "x: cannot read this .safetensors: "),
        (save({}), "x: expected one tensor, found 0"),
        (save({"b": torch.ones(1), "a": torch.ones(1)}), "x: expected one tensor, found 2: a, b"),
        (save({"a": torch.ones(1, 2, 3)}), "x: features must be [V, D] (tokens, width), got shape [1, 2, 3]"),
        (save({"a": torch.ones(2, 3, dtype=torch.int64)}), "x: features must be floating point, got int64"),
        (save({"a": torch.full((2, 3), torch.inf)}), "x: 6 of 6 features are NaN or infinite"),
    ],
)
def test_safetensors_that_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        decode(data, "safetensors")


# Beside a JSON


def test_features_are_named_like_images_are(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.npy").write_bytes(npy(VALUES))
    (tmp_path / "sub" / "b.SafeTensors").write_bytes(save({"x": torch.from_numpy(VALUES + 1)}))
    two = ["a.npy", "sub/b.SafeTensors"]
    parts = [{"type": "audio", "audio": name} for name in two]
    source = open_source(
        write_json(
            tmp_path,
            {"text": "<audio>x", "audio": "a.npy"},
            {"text": "<audio><audio>x", "audios": two},
            {"text": "<eeg>x", "eeg": two[1], "image": "a.npy", "subject": 3},
            {"messages": [{"role": "user", "content": parts}]},
        )
    )
    one, both, mixed, chat = source
    expected = [VALUES.tolist(), (VALUES + 1).tolist()]
    assert values(one.audio) == expected[:1]
    assert values(both.audio) == values(chat.audio) == expected
    assert (values(mixed.eeg), values(mixed.images), mixed.pictures) == (expected[1:], expected[:1], ())
    assert mixed.info == {"subject": 3}
    assert mixed.media == {"image": mixed.images, "audio": (), "eeg": mixed.eeg}
    assert one.audio[0].where == f"data.json[0], {tmp_path / 'a.npy'}"


def test_pictures_and_features_may_stand_in_one_sample(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    (tmp_path / "a.npy").write_bytes(npy(VALUES))
    sample = open_source(write_json(tmp_path, {"text": "<image><audio>", "image": "a.png", "audio": "a.npy"}))[0]
    assert sample.pictures == sample.images
    assert values(sample.audio) == [VALUES.tolist()]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"audio": "a.wav"}, "the audio 'a.wav' holds no features; expected one of .npy, .safetensors"),
        ({"eeg": "a.png"}, "the eeg 'a.png' holds no features"),
        ({"audio": "../a.npy"}, "the audio '../a.npy' lies outside of the folder of images"),
        ({"audio": "https://a.org/a.npy"}, "the audio 'https://a.org/a.npy' is a URL; audio clips are read from files"),
        ({"audio": "a.npy", "audios": ["b.npy"]}, "audio clips are named twice; give them in one of 'audio', 'audios'"),
        ({"eeg": [1]}, "EEG recordings must be file names, got [1]"),
    ],
)
def test_names_that_cannot_be_used_are_refused_on_opening(record: Any, message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, {"text": "x"}, {"text": "x", **record})
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}[1]: {message}')}"):
        open_source(path)


def test_files_that_cannot_be_used_are_named_with_their_sample(tmp_path: Path) -> None:
    (tmp_path / "nan.npy").write_bytes(npy(VALUES * np.nan))
    (tmp_path / "trap.npy").write_bytes(TRAP)
    names = ("nan.npy", "trap.npy", "gone.npy")
    source = open_source(write_json(tmp_path, *({"text": "<audio>", "audio": name} for name in names)))
    for index, message in enumerate(("6 of 6 features are NaN", "the array holds pickled objects")):
        where = f"data.json[{index}], {tmp_path / names[index]}: {message}"
        with pytest.raises(ValueError, match=f"^{re.escape(where)}"):
            source[index]
    with pytest.raises(FileNotFoundError, match=re.escape(f"data.json[2]: there is no audio {tmp_path / 'gone.npy'}")):
        source[2]


# In shards


def test_members_name_the_modality_of_features(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        ("0.audio.1.npy", npy(VALUES + 1)),
        ("0.audio.0.safetensors", save({"x": torch.from_numpy(VALUES)})),
        ("0.json", json.dumps({"text": "<eeg><audio><audio>x"}).encode()),
        ("0.eeg.npy", npy(VALUES + 2)),
        ("1.image.npy", npy(VALUES)),
        ("1.audio.npy", npy(VALUES)),
        ("1.txt", b"a caption"),
    )
    first, second = open_source(path)
    assert values(first.audio) == [VALUES.tolist(), (VALUES + 1).tolist()]
    assert values(first.eeg) == [(VALUES + 2).tolist()]
    assert first.images == ()
    assert values(second.images) == values(second.audio) == [VALUES.tolist()]
    assert second.text == "<image><audio>a caption"
    assert second.audio[0].where == "a.tar:1, audio 0"


RECORD = ("a.json", b'{"text": "x"}')


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([RECORD, ("a.npy", b"")], "a member .npy is refused: features name their modality, as in .image.npy"),
        ([RECORD, ("a.0.safetensors", b"")], "a member .0.safetensors is refused: features name their modality"),
        ([RECORD, ("a.audio.npz", b"")], "a member .audio.npz is refused: loading a pickle can run code"),
        ([RECORD, ("a.adio.npy", b"")], "a member .adio.npy is refused: features name their modality"),
        ([RECORD, ("a.audio.0.npy", b""), ("a.audio.2.npy", b"")], "audio clips are numbered [0, 2]; expected [0, 1]"),
        ([RECORD, ("a.audio.npy", b""), ("a.audio.0.safetensors", b"")], "two members are the same part of the sample"),
        ([RECORD, ("a.png", b""), ("a.image.npy", b"")], "two members are the same part of the sample"),
        ([("a.audio.npy", b"")], "audio clips without a record; expected {key}.json or {key}.txt beside them"),
    ],
)
def test_members_that_no_sample_can_have(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", *members)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:a: {message}')}"):
        open_source(path)


def test_damage_names_shard_sample_and_medium(tmp_path: Path) -> None:
    record = json.dumps({"text": "<audio>", "audio": "b.npy"}).encode()
    path = write_tar(tmp_path / "a.tar", ("0.json", record), ("0.audio.npy", TRAP), ("1.json", record))
    source = open_source(path)
    with pytest.raises(ValueError, match=r"^a\.tar:0, audio 0: the array holds pickled objects"):
        source[0]
    with pytest.raises(ValueError, match=r"^a\.tar:1: the record names the audio 'b\.npy', but the shard has none"):
        source[1]
