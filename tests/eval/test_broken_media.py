"""Thirty media that cannot be used, and some odd ones that can, in one task that is answered to its end."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image

from mmfuse.eval.runner import run_task
from mmfuse.eval.scoring import score_run
from mmfuse.eval.tasks.items import Item, MediaFile, Task, ask

NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def npy(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def broken():
    image = Image.fromarray(NOISE)
    files = {kind: saved(image, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")}
    frames = [Image.fromarray(255 - NOISE)]
    found = {f"cut-{share}.{kind.lower()}": data[: int(len(data) * share)]
             for kind, data in files.items() for share in (0.1, 0.5)}  # fmt: skip
    flipped = bytearray(files["PNG"])
    flipped[len(flipped) // 2] ^= 0xFF
    return found | {
        "empty.jpg": b"",
        "one-byte.png": b"\x89",
        "zeros.png": bytes(500),
        "flipped.png": bytes(flipped),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "paper.pdf": b"%PDF-1.4\n%%EOF",
        "deep.png": saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
        "float.tiff": saved(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
        "moving.webp": saved(image, "WEBP", save_all=True, append_images=frames),
        "bomb.png": huge_png(),
        "features.npy": npy(np.ones((4, 8), np.float32)),
        "nan.npy": npy(np.full((4, 8), np.nan, np.float32)),
        "pickled.npy": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        "integers.npy": npy(np.ones((4, 8), np.int64)),
        "pickle.png": pickle.dumps({"a": 1}),
    }


def odd():
    """What looks unusual and can be read."""
    image = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = image.convert("RGBA").quantize(16)
    return {
        "first frame.gif": saved(image, "GIF", save_all=True, append_images=[Image.fromarray(255 - NOISE)]),
        "ink.jpg": saved(image.convert("CMYK"), "JPEG"),
        "palette.png": saved(clear, "PNG", transparency=3),
        "turned.jpg": saved(image, "JPEG", exif=exif),
        "dot.png": saved(image.resize((1, 1)), "PNG"),
        "grey.png": saved(image.convert("LA"), "PNG"),
        "bilevel.png": saved(image.convert("1"), "PNG"),
    }


def test_every_broken_medium_is_counted_and_named_and_every_odd_one_is_read(engine, tmp_path):
    bad = broken()
    files = {**bad, **odd()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    missing = ["missing.png"]
    assert len(bad) + len(missing) >= 30
    items = []
    for name in [*files, *missing]:
        media = (MediaFile.of_path(tmp_path / name),)
        items.append(Item(name, ask("Is there a 3?", media), media, "yes"))
    run = run_task(engine, Task("broken", "exact_match", "official", tuple(items), max_new_tokens=3), tmp_path / "out")
    assert len(run.records) == len(items)
    assert {record["id"] for record in run.errors} == {*bad, *missing}
    for record in run.errors:
        assert record["id"] in record["error"] and record["prediction"] == ""
    score = score_run(run)
    assert score.primary[1].clusters == len(items)
    assert f"{len(bad) + 1} of {len(items)} samples could not be asked" in score.warnings[0]
