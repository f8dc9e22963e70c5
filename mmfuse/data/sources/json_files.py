"""JSON and JSON-lines files with their media beside them: LLaVA conversations, chats, documents."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmfuse.data.decoders import DEFAULT_BUDGET, FEATURE_FORMATS, PICTURE, Budget
from mmfuse.data.samples import Sample
from mmfuse.data.sources.files import FilePool, read_whole
from mmfuse.data.sources.records import parse_record
from mmfuse.data.sources.undecoded import Undecoded, decoded
from mmfuse.errors import DataError
from mmfuse.models.media import MEDIA

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_BOM: Final = b"\xef\xbb\xbf"
#: Records whose media are likely to lie together.
_PART: Final = 1024


class JSONSource:
    """The records of a file that holds a JSON list, or objects behind each other (one on a line, as a rule).

    All records are checked on opening; kept are only their places in the file, so that worker processes share nothing.

    Args:
        path: the file.
        images: folder to which names of media are relative; without it, the file's own folder.
        budget: how large a medium may be.

    Raises:
        DataError: naming file and line where it is no JSON, or file and record that cannot be used.
    """

    def __init__(self, path: Path, images: Path | None = None, budget: Budget = DEFAULT_BUDGET) -> None:
        self.name, self.path, self._budget = path.name, path, budget
        self._root = Path(os.path.abspath(images if images is not None else path.parent))
        self._pool = FilePool([path])
        data = path.read_bytes()
        spans: list[tuple[int, int]] = []
        for number, (begin, end, raw) in enumerate(_records(path, data)):
            where = f"{path}[{number}]"
            sample_of_record(raw, where, self._root)
            spans.append((begin, end))
        if not spans:
            raise DataError(f"{path} holds no samples")
        self._spans = np.array(spans, dtype=np.int64)
        self._digest = hashlib.sha256(data).hexdigest()

    @property
    def parts(self) -> list[int]:
        whole, rest = divmod(len(self), _PART)
        return [_PART] * whole + ([rest] if rest else [])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Sample:
        return decoded(self.read(index))

    def key(self, index: int) -> str:
        return f"{self.name}[{range(len(self))[index]}]"

    def read(self, index: int) -> Sample:
        at = range(len(self))[index]
        begin, end = self._spans[at].tolist()
        raw = json.loads(self._pool.read(0, begin, end - begin))
        return sample_of_record(raw, self.key(at), self._root, self._budget)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the file's name and contents; its media do not enter."""
        return hashlib.sha256(json.dumps([self.name, self._digest]).encode()).hexdigest()


def sample_of_record(raw: object, key: str, root: Path, budget: Budget = DEFAULT_BUDGET) -> Sample:
    """The sample of one record, whose names of files are relative to `root`; no file is opened.

    Raises:
        DataError: the record cannot be used, or names a file outside of `root`.
    """
    record = parse_record(raw, key)
    media = {
        modality: tuple(_medium(modality, name, key, root, budget) for name in names)
        for modality, names in record.media.items()
    }
    return Sample(
        key, media["image"], record.messages, record.text, record.info, audio=media["audio"], eeg=media["eeg"]
    )


def records_with_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield every record of a JSON file with the number of the line on which it begins.

    Raises:
        DataError: naming file and line where it is no JSON.
    """
    data = path.read_bytes()
    line, seen = 1, 0
    for begin, _, raw in _records(path, data):
        line, seen = line + data.count(b"\n", seen, begin), begin
        yield line, raw


def _medium(modality: str, name: str, key: str, root: Path, budget: Budget) -> Undecoded:
    path = _path(modality, name, key, root)
    ending, where = _ending(path), f"{key}, {path}"
    read = partial(read_whole, path, modality, key, budget)
    return Undecoded(read, ending if ending in FEATURE_FORMATS else PICTURE, where, budget)


def _path(modality: str, name: str, where: str, root: Path) -> Path:
    """Data bring names from elsewhere: none may lead out of the folder of images."""
    if "://" in name or name.startswith("data:"):
        plural = MEDIA[modality].plural
        raise DataError(f"{where}: the {modality} {name!r:.80} is a URL; {plural} are read from files")
    root = Path(os.path.abspath(root))
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root) or path == root:
        raise DataError(f"{where}: the {modality} {name!r} lies outside of the folder of images {root}")
    if modality != "image" and _ending(path) not in FEATURE_FORMATS:
        formats = ", ".join(f".{ending}" for ending in FEATURE_FORMATS)
        raise DataError(f"{where}: the {modality} {name!r} holds no features; expected one of {formats}")
    return path


def _ending(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _records(path: Path, data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield `(begin, end, value)` in bytes for each record, one at a time: a parsed file is several times its size."""
    try:
        skipped = len(_BOM) if data.startswith(_BOM) else 0
        text = data[skipped:].decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    decoder = json.JSONDecoder()
    at = _space(text, 0)
    in_list = text.startswith("[", at)
    done = False
    if in_list:
        at = _space(text, at + 1)
        done = text.startswith("]", at)
        at = _space(text, at + 1) if done else at
    byte, seen = skipped, 0  # `byte` is where the character `seen` begins
    while not done and (in_list or at < len(text)):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: unreadable JSON: {error.msg} (column {error.colno})"
            ) from error
        begin = byte + at - seen  # between records stand commas and white space, a byte each
        byte, seen = begin + len(text[at:end].encode()), end
        yield begin, byte, value
        at = _space(text, end)
        if in_list:
            done = text.startswith("]", at)
            if not done and not text.startswith(",", at):
                raise DataError(f"{path}, line {_line(text, at)}: unreadable JSON: expected ',' or ']' after a record")
            at = _space(text, at + 1)
    if in_list and at < len(text):
        raise DataError(f"{path}, line {_line(text, at)}: unreadable JSON: text after the end of the list")


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
