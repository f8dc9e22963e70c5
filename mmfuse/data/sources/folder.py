"""A folder of media files, each with a text beside it: `cat.jpg` and `cat.txt`, or `cat.json`."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from mmfuse.data.decoders import DEFAULT_BUDGET, PICTURE, PICTURES, Budget, decode_file
from mmfuse.data.samples import Sample
from mmfuse.data.sources.files import read_whole
from mmfuse.data.sources.records import parse_record
from mmfuse.data.sources.undecoded import Undecoded, decoded
from mmfuse.errors import DataError


class FolderSource:
    """The images of a folder and its subfolders, with their captions or records, by name.

    Args:
        folder: holds pairs of an image and a `.txt` (a caption) or `.json` (a record) of the same name.
        budget: how large a file may be.

    Raises:
        DataError: an image without text or with two, or no images.
    """

    def __init__(self, folder: Path, budget: Budget = DEFAULT_BUDGET) -> None:
        self.name, self._folder, self._budget = folder.name, folder, budget
        self._pairs: list[tuple[Path, Path]] = []
        for image in sorted(path for path in folder.rglob("*") if path.suffix.lower().removeprefix(".") in PICTURES):
            texts = [text for ending in (".txt", ".json") if (text := image.with_suffix(ending)).is_file()]
            if len(texts) != 1:
                found = "none" if not texts else "both"
                raise DataError(f"{image}: expected a .txt or a .json of the same name beside it, found {found}")
            self._pairs.append((image, texts[0]))
        if not self._pairs:
            raise DataError(f"{folder}: no shards, no JSON or parquet file, and no images with texts beside them")

    @property
    def parts(self) -> list[int]:
        return [1] * len(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        return decoded(self.read(index))

    def key(self, index: int) -> str:
        return str(self._pairs[index][0].relative_to(self._folder))

    def read(self, index: int) -> Sample:
        image, text = self._pairs[index]
        key = self.key(index)
        ending, where = text.suffix.removeprefix("."), f"{key}, {text}"
        content: Any = decode_file(read_whole(text, "text", key, self._budget), ending, where, self._budget)
        record = parse_record(content if ending == "json" else {"text": _marked(content.strip())}, key)
        read = partial(read_whole, image, "image", key, self._budget)
        medium = Undecoded(read, PICTURE, f"{key}, {image}", self._budget)
        return Sample(key, (medium,), record.messages, record.text, record.info)

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, sizes and times of the files."""
        facts = [
            [str(path.relative_to(self._folder)), path.stat().st_size, path.stat().st_mtime_ns]
            for pair in self._pairs
            for path in pair
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _marked(caption: str) -> str:
    return caption if "<image>" in caption else f"<image>{caption}"
