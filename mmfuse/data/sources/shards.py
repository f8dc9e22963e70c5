"""Webdataset shards, read at random.

On opening, only the headers of the tar files are read. A sample is what shares a key, the name up to the first dot:
`{key}.json` or `{key}.txt` or both, and images `{key}.0.png`, `{key}.1.png`, ... or a single `{key}.jpg`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmfuse.data.samples import Sample
from mmfuse.data.sources.files import FilePool
from mmfuse.data.sources.images import FORMATS, decode_image
from mmfuse.data.sources.records import parse_record
from mmfuse.data.sources.tar import Member, members
from mmfuse.errors import DataError
from mmfuse.models.chat import IMAGE_TOKEN

_IMAGE: Final = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(FORMATS)})")
_JSON, _TXT, _FIRST_IMAGE = 0, 1, 2
_PICKLES: Final = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten")


class _Index(NamedTuple):
    """Members of samples: those of sample `i` are `begins[i]` to `begins[i + 1]`, its images in reading order."""

    keys: NDArray[np.bytes_]  # [N]
    begins: NDArray[np.int64]  # [N + 1]
    kinds: NDArray[np.uint8]  # [M]: JSON, text or image
    offsets: NDArray[np.int64]  # [M]
    sizes: NDArray[np.int64]  # [M]


class ShardSource:
    """The samples of tar shards, in the order of the shards and of their members.

    Args:
        paths: the shards.
        checksums: SHA-256 by path, where a manifest gives it; goes into the fingerprint.
        name: names the source in messages.

    Raises:
        DataError: naming shard and key: a truncated or damaged tar, a sample without record or whose members do not
            stand together, images with a gap in their numbers, a member that no sample can have.
    """

    def __init__(
        self, paths: Sequence[Path], checksums: Mapping[Path, str] | None = None, name: str = "shards"
    ) -> None:
        if not paths:
            raise DataError(f"{name}: a source needs at least one shard")
        self.name = name
        self._pool = FilePool(paths)
        self._shards = [_index(self._pool, number) for number in range(len(paths))]
        self._pool.close()
        self._ends = np.array(list(accumulate(len(shard.keys) for shard in self._shards)))
        self._checksums = dict(checksums or {})

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        at = range(len(self))[index]
        number = int(np.searchsorted(self._ends, at, side="right"))
        shard = self._shards[number]
        row = at - (int(self._ends[number - 1]) if number else 0)
        key = f"{self._pool.paths[number].name}:{shard.keys[row].decode(errors='replace')}"
        own = slice(int(shard.begins[row]), int(shard.begins[row + 1]))
        kinds, offsets, sizes = (column[own].tolist() for column in (shard.kinds, shard.offsets, shard.sizes))
        # The members lie together: one call reads them all.
        begin, end = min(offsets), max(offset + size for offset, size in zip(offsets, sizes, strict=True))
        data = self._pool.read(number, begin, end - begin)
        if len(data) != end - begin:
            raise DataError(f"{key}: the shard ended while it was read: {self._pool.paths[number]}")
        parts = [data[offset - begin : offset - begin + size] for offset, size in zip(offsets, sizes, strict=True)]
        return _sample(key, kinds, parts)

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, sizes and tables of members, and over the manifest's checksums."""
        digest = hashlib.sha256()
        for path, size, shard in zip(self._pool.paths, self._pool.sizes, self._shards, strict=True):
            digest.update(json.dumps([path.name, size, self._checksums.get(path)]).encode())
            for column in shard:
                digest.update(column.tobytes())
        return digest.hexdigest()


def _sample(key: str, kinds: Sequence[int], parts: Sequence[bytes]) -> Sample:
    images = tuple(
        decode_image(part, f"{key}, image {number}")
        for number, part in enumerate(part for kind, part in zip(kinds, parts, strict=True) if kind >= _FIRST_IMAGE)
    )
    raw: Any = {}
    try:
        if _JSON in kinds:
            raw = json.loads(parts[kinds.index(_JSON)])
        text = parts[kinds.index(_TXT)].decode() if _TXT in kinds else None
    except ValueError as error:
        raise DataError(f"{key}: the record cannot be read: {error}") from error
    if text is not None:
        if not isinstance(raw, Mapping) or "text" in raw:
            raise DataError(f"{key}: beside {{key}}.txt, {{key}}.json must be an object without 'text'")
        # Caption shards, as img2dataset writes them, have no placeholders: their images come first.
        raw = {**raw, "text": text if IMAGE_TOKEN in text else IMAGE_TOKEN * len(images) + text}
    record = parse_record(raw, key)
    if record.images and not images:
        raise DataError(f"{key}: the record names the image {record.images[0]!r}, but the shard has none for this key")
    return Sample(key, images, record.messages, record.text, record.info)


def _index(pool: FilePool, number: int) -> _Index:
    """Group the members of one shard."""
    path = pool.paths[number]
    keys: list[bytes] = []
    begins, kinds, offsets, sizes = [0], list[int](), list[int](), list[int]()
    current, seen, group = None, set[str](), list[tuple[int, Member]]()

    def close() -> None:
        group.sort()
        _check_group(f"{path}:{current}", [kind for kind, _ in group])
        keys.append(str(current).encode("utf-8", "surrogateescape"))
        for kind, member in group:
            kinds.append(min(kind, _FIRST_IMAGE))
            offsets.append(member.offset)
            sizes.append(member.size)
        begins.append(len(kinds))
        group.clear()

    for member in members(pool, number):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not stem or not dot:
            raise DataError(f"{path}: member {member.name!r} has no key: members are named key.ending, e.g. 0001.json")
        key = f"{folder}{slash}{stem}"
        if key != current:
            if group:
                close()
            if key in seen:
                raise DataError(f"{path}:{key}: the members of this key do not stand together, or it occurs twice")
            seen.add(key)
            current = key
        kind = _member_kind(ending.lower())
        if isinstance(kind, str):
            raise DataError(f"{path}:{key}: {kind}")
        group.append((kind, member))
    if not group:
        raise DataError(f"{path} holds no samples")
    close()
    return _Index(
        np.array(keys),
        np.array(begins),
        np.array(kinds, np.uint8),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
    )


@lru_cache(maxsize=1024)
def _member_kind(ending: str) -> int | str:
    """What a member is by its name's ending: JSON, text, image 0, image 1, ...; or why it is refused."""
    if ending in ("json", "txt"):
        return _JSON if ending == "json" else _TXT
    if image := _IMAGE.fullmatch(ending):
        return _FIRST_IMAGE + int(image[1] or 0)
    if ending.rpartition(".")[2] in _PICKLES:
        return f"a member .{ending} is refused: loading a pickle can run code; use json, txt and images"
    return f"unknown member .{ending}; samples consist of .json or .txt, and images: {', '.join(FORMATS)}"


def _check_group(where: str, kinds: list[int]) -> None:
    """`kinds` is sorted."""
    if kinds[0] not in (_JSON, _TXT):
        raise DataError(f"{where}: images without a record; expected {{key}}.json or {{key}}.txt beside them")
    if len(set(kinds)) != len(kinds):
        raise DataError(f"{where}: two members are the same part of the sample (two records, or images of one number)")
    images = [kind - _FIRST_IMAGE for kind in kinds if kind >= _FIRST_IMAGE]
    if images and (images[0] > 1 or images[-1] - images[0] != len(images) - 1):
        raise DataError(f"{where}: images are numbered {images}; expected {list(range(len(images)))}")
