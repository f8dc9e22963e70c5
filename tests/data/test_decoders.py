"""Formats are decoded by the name's ending, within budgets, and none of them runs code."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmfuse.data.decoders import DECODERS, PICTURE, PICTURES, Budget, Recording, decode_file
from mmfuse.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def image(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form, **options)
    return file.getvalue()


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def wav(values: int = 800, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.arange(values, dtype="<i2") * 7).tobytes())
    return file.getvalue()


def edf(
    records: int = 3, labels: tuple[str, ...] = ("Fp1", "Fp2", "EDF Annotations"), claim: int | None = None
) -> bytes:
    """Signals of 4 values a record of 2 s, between -100 and 100 µV; value v of channel c is 10 c + v."""
    count = len(labels)
    fields = [("0", 8), ("", 80), ("", 80), ("", 8), ("", 8), (str(256 * (count + 1)), 8), ("", 44)]
    fields += [(str(records if claim is None else claim), 8), ("2", 8), (str(count), 4)]
    columns = [labels, [""] * count, ["uV"] * count, ["-100"] * count, ["100"] * count, ["-1000"] * count]
    columns += [["1000"] * count, [""] * count, ["4"] * count, [""] * count]
    widths = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)
    header = "".join(text.ljust(width) for text, width in fields)
    header += "".join(text.ljust(width) for column, width in zip(columns, widths, strict=True) for text in column)
    body = [10 * (10 * c + 4 * r + v) for r in range(records) for c in range(count) for v in range(4)]
    return header.encode() + np.array(body, "<i2").tobytes()


@pytest.mark.parametrize(("ending", "form"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG"), ("JPEG", "JPEG")])
def test_images(ending: str, form: str) -> None:
    found = decode_file(image(form, **({"lossless": True} if form == "WEBP" else {})), ending, "a")
    assert found.size == (8, 6)
    if form != "JPEG":
        assert np.array_equal(np.asarray(found), PIXELS)


def test_gif_gives_its_first_frame() -> None:
    frames = [Image.new("L", (4, 4), grey) for grey in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_file(file.getvalue(), "gif", "a").convert("L")).max() == 10


def flat(mode: str = "L", size: tuple[int, int] = (4, 4), kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **how)
    return file.getvalue()


def test_images_come_grey_or_in_colour() -> None:
    modes = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB"}
    assert {mode: decode_file(flat(mode), "png", "x").mode for mode in modes} == modes
    assert decode_file(flat("CMYK", kind="JPEG"), "jpg", "x").mode == "RGB"


@pytest.mark.parametrize("ending", [*PICTURES, PICTURE])
def test_format_of_an_image_is_that_of_its_bytes(ending: str) -> None:
    assert decode_file(flat(size=(3, 2), kind=PICTURES.get(ending, "PNG")), ending, "x").size == (3, 2)
    assert np.array_equal(decode_file(image("PNG"), ending, "x"), PIXELS), "many files of the web are misnamed"


def test_photographs_stand_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_file(flat("RGB", (4, 2), "JPEG", exif=exif), "jpg", "x").size == (2, 4)


def test_of_a_photograph_with_a_thumbnail_the_photograph_is_read() -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (2, 2))]}
    assert decode_file(flat("RGB", (8, 8), "MPO", **more), "jpg", "x").size == (8, 8)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF"])
def test_images_that_would_lose_something_are_refused(kind: str) -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), (9, 0, 0))]}
    with pytest.raises(DataError, match=r"^k: the image has several frames"):
        decode_file(flat("RGB", kind=kind, **more), kind.lower(), "k")


def test_deep_and_foreign_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"^k: the image has mode I;16, more than 8 bits"):
        decode_file(flat("I;16"), "png", "k")
    with pytest.raises(DataError, match=r"^k: cannot read this image: "):
        decode_file(flat(kind="PCX"), "png", "k")  # a format that is not among ours


def test_edf_in_its_own_units() -> None:
    found = decode_file(edf(), "edf", "a")
    assert found.channels == ("Fp1", "Fp2") and found.rate == 2.0 and found.values.shape == (12, 2)
    expected = np.array([[10 * c + 4 * r + v for c in range(2)] for r in range(3) for v in range(4)], np.float32)
    np.testing.assert_allclose(found.values, expected, atol=1e-4)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_audio(ending: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    signal = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 440).astype(np.float32) * 0.5
    file = io.BytesIO()
    soundfile.write(file, np.stack([signal, -signal], 1), 16000, format=ending.upper())
    found = decode_file(file.getvalue(), ending, "a")
    assert isinstance(found, Recording) and found.rate == 16000 and found.values.shape[1] == 2
    assert found.values.dtype == np.float32 and abs(float(found.values[4000:12000, 0].std()) - 0.354) < 0.02
    with pytest.raises(DataError, match=r"1 seconds, more than the limit of 0\.5"):
        decode_file(file.getvalue(), ending, "a", Budget(seconds=0.5))


def test_array_text_and_json() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(decode_file(npy(array), "npy", "a"), array)
    assert decode_file("é".encode(), "txt", "a") == "é"
    assert decode_file(b'{"a": [1]}', "json", "a") == {"a": [1]}


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def npy_of(count: int) -> bytes:
    return npy(np.zeros(3)).replace(b"(3,), }" + b" " * 10, b"(%d,), }" % count + b" " * (11 - len(str(count))))


def tensors(values: int = 3, header: int | None = None) -> bytes:
    """A safetensors file of 3 numbers that claims others."""
    entry = {"a": {"dtype": "F32", "shape": [values], "data_offsets": [0, 12]}}
    text = json.dumps(entry).encode()
    return struct.pack("<Q", len(text) if header is None else header) + text + bytes(12)


@pytest.mark.parametrize(
    ("data", "ending", "budget", "says"),
    [
        (png_of(15000, 11000), "png", Budget(), "165,000,000 pixels, more than the limit of 89,478,485"),
        (image("PNG"), "png", Budget(bytes=50), "bytes, more than the limit of 50"),
        (flat(size=(5, 5)), "png", Budget(pixels=24), "25 pixels, more than the limit of 24"),
        (tensors(values=10**9), "safetensors", Budget(), "1,000,000,000 values, more than the limit"),
        (tensors(header=1 << 40), "safetensors", Budget(), "the header should have 1099511627776 bytes"),
        (npy_of(10**9), "npy", Budget(), "1,000,000,000 values, more than the limit"),
        (npy_of(10**6), "npy", Budget(), "the header says 1000000 values of float64, 24 bytes follow"),
        (edf(claim=10**6), "edf", Budget(), "2,000,000 seconds, more than the limit of 3,600.0"),
        (edf(claim=5), "edf", Budget(), "36 values follow the header, expected 60"),
        (b"\xff", "txt", Budget(), "cannot read this .txt"),
        (b" \n", "txt", Budget(), "the text is empty"),
        (b"{", "json", Budget(), "cannot read this .json"),
        (image("JPEG")[:200], "jpg", Budget(), "cannot read this image"),
        (b"GIF", "jpg", Budget(), "cannot read this image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bombs_and_damage_are_named_before_they_are_decoded(
    data: bytes, ending: str, budget: Budget, says: str
) -> None:
    with pytest.raises(DataError, match=r"^shard:key: ") as raised:
        decode_file(data, ending, "shard:key", budget)
    assert says in str(raised.value)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "ending",
    ["pkl", "pyd", "pickle", "pth", "pt", "npz", "txt.pkl.gz", "txt.gz", "tensor.pyd", "npy", "json", "jpg", "wav"],
)
def test_payloads_run_nothing(ending: str, tmp_path: Path) -> None:
    """The same object under every name, also as what the format's own writer makes of it."""
    marker = tmp_path / "code_ran"
    plain = pickle.dumps(Evil(marker))
    saved = io.BytesIO()
    torch.save(Evil(marker), saved)
    array = npy(np.array([Evil(marker)], dtype=object), allow_pickle=True)
    for data in (plain, gzip.compress(plain), saved.getvalue(), array):
        with pytest.raises(DataError):
            decode_file(data, ending, "shard:key")
    assert not marker.exists()


def test_gzip_is_not_unpacked() -> None:
    with pytest.raises(DataError, match=r"unknown format 'txt\.gz'"):
        decode_file(gzip.compress(b"\0" * (1 << 20)), "txt.gz", "a")


WHOLE = {
    "png": image("PNG"),
    "npy": npy(np.zeros((3, 2))),
    "edf": edf(),
    "wav": wav(),
    "json": b'{"a": 1}',
    "gif": image("GIF"),
}


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_damage_is_a_data_error_or_nothing(ending: str, data: st.DataObject) -> None:
    whole = bytearray(WHOLE[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        decode_file(cut, ending, "shard:key", Budget(bytes=10**6, pixels=10**4, values=10**5))
    except DataError as error:
        assert str(error).startswith("shard:key: ")


def test_table_is_what_the_documentation_lists() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert all(f"`{ending}`" in page for ending in DECODERS)
