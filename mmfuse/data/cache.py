"""Tables of shards, stored once and used while the shard is the same."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mmfuse.paths import cache_directory

Arrays = dict[str, NDArray[Any]]
#: Changes when the meaning of what is stored does.
VERSION: Final = 1
_SEAL: Final = "seal"


def load_arrays(path: Path, made_from: str) -> Arrays | None:
    """What `save_arrays` stored for `path`, if it was made from the same file and is undamaged.

    Args:
        path: of the file that the arrays describe.
        made_from: what tells that file from another one under the same name, such as its size and time.
    """
    try:
        with np.load(_place(path), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    seal = arrays.pop(_SEAL, None)
    return arrays if seal is not None and bytes(seal) == _seal(arrays, made_from) else None


def save_arrays(path: Path, made_from: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Store arrays about the file at `path`; where the cache cannot be written, they are made again next time."""
    place = _place(path)
    scratch = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            seal: Any = np.frombuffer(_seal(arrays, made_from), dtype=np.uint8)
            np.savez(file, **{**arrays, _SEAL: seal})
        os.replace(scratch, place)
    except OSError:
        scratch.unlink(missing_ok=True)


def _place(path: Path) -> Path:
    return cache_directory() / "shards" / f"{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]}.npz"


def _seal(arrays: Mapping[str, NDArray[Any]], made_from: str) -> bytes:
    digest = hashlib.sha256(f"{VERSION} {made_from}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
