"""Webdataset shards, read at random.

On opening, only the headers of the tar files are read. A sample is what shares a key, the name up to the first dot:
`{key}.json` or `{key}.txt` or both, and images `{key}.0.png`, `{key}.1.png`, ... or a single `{key}.jpg`. Features
name their modality: `{key}.audio.npy`, or `{key}.audio.0.npy`, `{key}.audio.1.npy`, ...
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmfuse.data.cache import load_arrays, save_arrays
from mmfuse.data.decoders import DEFAULT_BUDGET, FEATURE_FORMATS, PICTURE, PICTURES, Budget, decode_file
from mmfuse.data.samples import Sample
from mmfuse.data.sources.files import FilePool
from mmfuse.data.sources.records import parse_record
from mmfuse.data.sources.tar import Member, members
from mmfuse.data.sources.undecoded import Undecoded, decoded
from mmfuse.errors import DataError, SourceError
from mmfuse.models.media import MEDIA

_IMAGE: Final = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(PICTURES)})")
_FEATURES: Final = re.compile(rf"({'|'.join(MEDIA)})\.(?:(\d+)\.)?({'|'.join(FEATURE_FORMATS)})")
#: Smaller shards are looked through again in a moment.
_WORTH_STORING: Final = 1 << 22
_SPOT: Final = 1 << 14
_PICKLES: Final = ("pyd", "pkl", "pickle", "pth", "pt", "npz", "ten")


class _Kind(NamedTuple):
    """What a member holds: a record (no modality), a picture, or features; and for features in which format."""

    modality: str
    ending: str


_JSON, _TXT, _PICTURE = _Kind("", "json"), _Kind("", "txt"), _Kind("image", "picture")
#: An index stores places in this table, and the fingerprint of a source knows them: new kinds come last.
_KINDS: Final = (_JSON, _TXT, _PICTURE, *(_Kind(name, ending) for name in MEDIA for ending in FEATURE_FORMATS))


class _Index(NamedTuple):
    """Members of samples: those of sample `i` are `begins[i]` to `begins[i + 1]`, its media in reading order."""

    keys: NDArray[np.bytes_]  # [N]
    begins: NDArray[np.int64]  # [N + 1]
    kinds: NDArray[np.uint8]  # [M]: places in _KINDS
    offsets: NDArray[np.int64]  # [M]
    sizes: NDArray[np.int64]  # [M]


class ShardSource:
    """The samples of tar shards, in the order of the shards and of their members.

    Args:
        paths: the shards.
        checksums: SHA-256 by path, where a manifest gives it; goes into the fingerprint.
        name: names the source in messages.
        budget: how large a member may be.

    Raises:
        DataError: naming shard and key: a truncated or damaged tar, a sample without record or whose members do not
            stand together, media with a gap in their numbers, a member that no sample can have.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        checksums: Mapping[Path, str] | None = None,
        name: str = "shards",
        budget: Budget = DEFAULT_BUDGET,
    ) -> None:
        if not paths:
            raise DataError(f"{name}: a source needs at least one shard")
        self.name, self._budget = name, budget
        self._pool = FilePool(paths)
        self._shards = [_stored_index(self._pool, number) for number in range(len(paths))]
        self._pool.close()
        self._ends = np.array(list(accumulate(len(shard.keys) for shard in self._shards)))
        self._checksums = dict(checksums or {})

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def parts(self) -> list[int]:
        return [len(shard.keys) for shard in self._shards]

    def __getitem__(self, index: int) -> Sample:
        return decoded(self.read(index))

    def key(self, index: int) -> str:
        return self._place(index)[2]

    def _place(self, index: int) -> tuple[int, int, str]:
        """Shard, row in it, and key of a sample."""
        at = range(len(self))[index]
        number = int(np.searchsorted(self._ends, at, side="right"))
        row = at - (int(self._ends[number - 1]) if number else 0)
        key = self._shards[number].keys[row].decode(errors="replace")
        return number, row, f"{self._pool.paths[number].name}:{key}"

    def read(self, index: int) -> Sample:
        number, row, key = self._place(index)
        shard = self._shards[number]
        own = slice(int(shard.begins[row]), int(shard.begins[row + 1]))
        kinds, offsets, sizes = (column[own].tolist() for column in (shard.kinds, shard.offsets, shard.sizes))
        parts = [partial(self._bytes, number, key, *place) for place in zip(offsets, sizes, strict=True)]
        return _sample(key, [_KINDS[kind] for kind in kinds], parts, self._budget)

    def _bytes(self, number: int, key: str, offset: int, size: int) -> bytes:
        self._budget.check("bytes", size, key)
        data = self._pool.read(number, offset, size)
        if len(data) != size:
            raise SourceError(f"{key}: the shard ended while it was read: {self._pool.paths[number]}")
        return data

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, sizes and tables of members, and the manifest's checksums.

        Of a shard that no manifest lists, begin, middle and end stand for its contents.
        """
        digest = hashlib.sha256()
        for number, (path, size, shard) in enumerate(
            zip(self._pool.paths, self._pool.sizes, self._shards, strict=True)
        ):
            digest.update(json.dumps([path.name, size, self._checksums.get(path)]).encode())
            for offset in () if path in self._checksums else (0, size // 2, max(0, size - _SPOT)):
                digest.update(self._pool.read(number, offset, _SPOT))
            for column in shard:
                digest.update(column.tobytes())
        return digest.hexdigest()


def _sample(key: str, kinds: Sequence[_Kind], parts: Sequence[Callable[[], bytes]], budget: Budget) -> Sample:
    media: dict[str, list[Any]] = {name: [] for name in MEDIA}
    for kind, part in zip(kinds, parts, strict=True):
        if kind.modality:
            own = media[kind.modality]
            ending = PICTURE if kind == _PICTURE else kind.ending
            own.append(Undecoded(part, ending, f"{key}, {kind.modality} {len(own)}", budget))
    raw: Any = decode_file(parts[kinds.index(_JSON)](), "json", key, budget) if _JSON in kinds else {}
    if _TXT in kinds:
        text = decode_file(parts[kinds.index(_TXT)](), "txt", key, budget)
        if not isinstance(raw, Mapping) or "text" in raw:
            raise DataError(f"{key}: beside {{key}}.txt, {{key}}.json must be an object without 'text'")
        raw = {**raw, "text": _with_placeholders(text, media)}
    record = parse_record(raw, key)
    for name, files in record.media.items():
        if files and not media[name]:
            raise DataError(f"{key}: the record names the {name} {files[0]!r}, but the shard has none for this key")
    images, audio, eeg = (tuple(media[name]) for name in ("image", "audio", "eeg"))
    return Sample(key, images, record.messages, record.text, record.info, audio=audio, eeg=eeg)


def _with_placeholders(text: str, media: Mapping[str, Sequence[Any]]) -> str:
    """A caption as img2dataset writes it has no placeholders: its media come first."""
    present = {MEDIA[name].placeholder: len(items) for name, items in media.items() if items}
    if any(placeholder in text for placeholder in present):
        return text
    return "".join(placeholder * count for placeholder, count in present.items()) + text


def _stored_index(pool: FilePool, number: int) -> _Index:
    """The index of a shard, from the cache if it was made of this very file: of the same size and time."""
    path = pool.paths[number]
    made_from = f"{pool.sizes[number]} {pool.times[number]} {len(_KINDS)}"
    if pool.sizes[number] < _WORTH_STORING:
        return _index(pool, number)
    stored = load_arrays(path, made_from)
    if stored is not None and stored.keys() == set(_Index._fields):
        return _Index(**stored)
    index = _index(pool, number)
    save_arrays(path, made_from, index._asdict())
    return index


def _index(pool: FilePool, number: int) -> _Index:
    """Group the members of one shard."""
    path = pool.paths[number]
    keys: list[bytes] = []
    begins, kinds, offsets, sizes = [0], list[int](), list[int](), list[int]()
    current, seen, group = None, set[str](), list[tuple[_Part, Member]]()

    def close() -> None:
        group.sort()
        _check_group(f"{path}:{current}", [part for part, _ in group])
        keys.append(str(current).encode("utf-8", "surrogateescape"))
        for part, member in group:
            kinds.append(part.kind)
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
        part = _part(ending.lower())
        if isinstance(part, str):
            raise DataError(f"{path}:{key}: {part}")
        group.append((part, member))
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


class _Part(NamedTuple):
    """A member's part in its sample; they sort as the sample lists them."""

    modality: str
    number: int
    kind: int  # a place in _KINDS


@lru_cache(maxsize=1024)
def _part(ending: str) -> _Part | str:
    """What a member is by its name's ending: JSON, text, image 0, image 1, ...; or why it is refused."""
    if ending in ("json", "txt"):
        place = _KINDS.index(_Kind("", ending))
        return _Part("", place, place)
    if image := _IMAGE.fullmatch(ending):
        return _Part("image", int(image[1] or 0), _KINDS.index(_PICTURE))
    if features := _FEATURES.fullmatch(ending):
        modality, number, form = features.groups()
        return _Part(modality, int(number or 0), _KINDS.index(_Kind(modality, form)))
    last = ending.rpartition(".")[2]
    if last in _PICKLES:
        return f"a member .{ending} is refused: loading a pickle can run code; use json, txt, images and features"
    if last in FEATURE_FORMATS:
        return f"a member .{ending} is refused: features name their modality, as in .{next(iter(MEDIA))}.{last}"
    return f"unknown member .{ending}; samples consist of .json or .txt, and images: {', '.join(PICTURES)}"


def _check_group(where: str, parts: list[_Part]) -> None:
    """`parts` is sorted."""
    if parts[0].modality:
        plural = MEDIA[parts[0].modality].plural
        raise DataError(f"{where}: {plural} without a record; expected {{key}}.json or {{key}}.txt beside them")
    if len({(part.modality, part.number) for part in parts}) != len(parts):
        raise DataError(f"{where}: two members are the same part of the sample (two records, or media of one number)")
    for modality, medium in MEDIA.items():
        numbers = [part.number for part in parts if part.modality == modality]
        if numbers and (numbers[0] > 1 or numbers[-1] - numbers[0] != len(numbers) - 1):
            expected = list(range(len(numbers)))
            raise DataError(f"{where}: {medium.plural} are numbered {numbers}; expected {expected}")
