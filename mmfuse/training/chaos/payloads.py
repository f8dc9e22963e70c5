"""What somebody may put into a data set to run code, or to fill memory, when it is read."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Payload(NamedTuple):
    """One file, or a path of data.

    Attributes:
        name: what it is.
        ending: of the file's name; None for the path of a source.
        data: the bytes of the file, or the path.
    """

    name: str
    ending: str | None
    data: bytes


class _Command:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def payloads(marker: Path) -> list[Payload]:
    """All payloads; those that run code would make the file `marker`."""
    pickled = pickle.dumps(_Command(marker))
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save(_Command(marker), saved)
    np.save(array, np.array([_Command(marker)], dtype=object), allow_pickle=True)
    pickles = ("pkl", "pyd", "pickle", "pth", "pt", "npz", "ten", "npy", "json", "jpg", "txt", "safetensors", "edf")
    return [
        *(Payload(f"pickle as .{ending}", ending, pickled) for ending in pickles),
        *(Payload(f"torch.save as .{ending}", ending, saved.getvalue()) for ending in ("pth", "pt", "npy", "png")),
        Payload("array of objects", "npy", array.getvalue()),
        *(Payload(f"gzip as .{ending}", ending, gzip.compress(pickled)) for ending in ("pkl.gz", "txt.gz", "txt")),
        Payload("gzip bomb", "txt", gzip.compress(bytes(1 << 24))),
        Payload("image bomb", "png", _png(15000, 11000)),
        Payload("array that claims 8 GiB", "npy", _npy(1 << 30)),
        Payload("tensor that claims 4 GiB", "safetensors", _safetensors(1 << 30)),
        Payload("recording that claims 1000 days", "edf", _edf(b"43200000")),
        Payload("JSON of 100,000 levels", "json", b"[" * 100_000),
        Payload("pipe:", None, f"pipe:touch {marker}; cat a.tar".encode()),
        Payload("file://", None, b"file:///etc/passwd"),
        Payload("another scheme", None, b"ftp://localhost/a.tar"),
    ]


def _png(width: int, height: int) -> bytes:
    """A few bytes that claim so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _npy(count: int) -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(24)


def _safetensors(count: int) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 12]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(12)


def _edf(records: bytes) -> bytes:
    start = b"0".ljust(184) + b"512".ljust(8) + b"".ljust(44) + records.ljust(8) + b"2".ljust(8) + b"1".ljust(4)
    return start + bytes(256)
