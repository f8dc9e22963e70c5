"""Parquet files as Hugging Face datasets store conversations, their images inside as `{bytes, path}`."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmfuse.data.decoders import DEFAULT_BUDGET, FEATURE_FORMATS, PICTURE, Budget
from mmfuse.data.samples import Sample
from mmfuse.data.sources.records import MEDIA_KEYS, parse_record
from mmfuse.data.sources.undecoded import Undecoded, decoded
from mmfuse.errors import ConfigError, DataError

#: Row groups that are kept: rows are read group by group.
_KEPT: Final = 4


class ParquetSource:
    """The rows of parquet files, in the order of the files.

    A row is a record: `messages`, `conversations` or `text`, with `image` or `images` (structs of `bytes` and `path`).
    The Cauldron's `texts`, a list of `{user, assistant}`, is read as well.

    Args:
        paths: the files.
        name: names the source in messages.
        budget: how large a medium may be.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file that is no parquet, or without a column that can be read.
    """

    def __init__(self, paths: Sequence[Path], name: str, budget: Budget = DEFAULT_BUDGET) -> None:
        self.name, self._paths, self._budget = name, list(paths), budget
        self._groups: list[tuple[int, int]] = []
        counts = []
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths):
            try:
                metadata = _pyarrow().ParquetFile(path).metadata
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: no readable parquet file: {error}") from error
            digest.update(json.dumps([path.name, path.stat().st_size, metadata.num_rows]).encode())
            with path.open("rb") as file:
                # The end of the file holds places and statistics of all columns.
                file.seek(-min(path.stat().st_size, 1 << 16), 2)
                digest.update(file.read())
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                counts.append(metadata.row_group(group).num_rows)
        if not sum(counts):
            raise DataError(f"{name} holds no rows")
        self._counts, self._ends = counts, np.cumsum(counts)
        self._digest = digest.hexdigest()
        self._open: OrderedDict[int, Any] = OrderedDict()

    @property
    def parts(self) -> list[int]:
        return [count for count in self._counts if count]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        return decoded(self.read(index))

    def key(self, index: int) -> str:
        at = range(len(self))[index]
        file, _ = self._groups[int(np.searchsorted(self._ends, at, side="right"))]
        return f"{self._paths[file].name}[{at}]"

    def read(self, index: int) -> Sample:
        at = range(len(self))[index]
        number = int(np.searchsorted(self._ends, at, side="right"))
        row = at - int(self._ends[number] - self._counts[number])
        raw = self._table(number).slice(row, 1).to_pylist()[0]
        return _sample({name: value for name, value in raw.items() if value is not None}, self.key(at), self._budget)

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, sizes and the tables at the end of the files."""
        return self._digest

    def _table(self, number: int) -> Any:
        if number not in self._open:
            file, group = self._groups[number]
            self._open[number] = _pyarrow().ParquetFile(self._paths[file]).read_row_group(group)
            if len(self._open) > _KEPT:
                self._open.popitem(last=False)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _sample(raw: dict[str, Any], key: str, budget: Budget) -> Sample:
    media: dict[str, tuple[Undecoded, ...]] = {}
    for modality, names in MEDIA_KEYS.items():
        for name in names:
            if name in raw:
                given = raw.pop(name)
                items = given if isinstance(given, list) else [given]
                media[modality] = tuple(
                    _medium(modality, item, f"{key}, {name} {at}", budget) for at, item in enumerate(items)
                )
    if "texts" in raw:
        pairs = raw.pop("texts")
        marks = "".join(f"<{modality}>" * len(items) for modality, items in media.items())
        raw["messages"] = [
            {"role": role, "content": (marks if not at and role == "user" else "") + str(pair[role])}
            for at, pair in enumerate(pairs)
            for role in ("user", "assistant")
        ]
    record = parse_record(_without_nulls(raw), key)
    images, audio, eeg = (media.get(name, ()) for name in ("image", "audio", "eeg"))
    return Sample(key, images, record.messages, record.text, record.info, audio=audio, eeg=eeg)


def _medium(modality: str, item: object, where: str, budget: Budget) -> Undecoded:
    if not isinstance(item, Mapping) or not isinstance(item.get("bytes"), bytes):
        raise DataError(f"{where}: expected a struct with the bytes of a file, as Hugging Face datasets store them")
    suffix = Path(str(item.get("path") or "")).suffix.lower().removeprefix(".")
    if modality != "image" and suffix not in FEATURE_FORMATS:
        raise DataError(f"{where}: expected features, a path that ends in {' or '.join(FEATURE_FORMATS)}")
    return Undecoded(partial(bytes, item["bytes"]), suffix if suffix in FEATURE_FORMATS else PICTURE, where, budget)


def _without_nulls(value: Any) -> Any:
    """Columns of structs have every key in every row: those that a content part does not have are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow: pip install 'mmfuse[eval]'") from error
    return pyarrow.parquet
