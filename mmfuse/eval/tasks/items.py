"""What a task asks: items, their media as bytes that are read when they are needed, and what is wanted of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from mmfuse.data.decoders import FEATURE_FORMATS, PICTURE, decode_file
from mmfuse.errors import DataError
from mmfuse.models.chat import Message
from mmfuse.models.media import MEDIA, Features

#: Fields of a row that the runner writes itself; a task's own fields must have other names.
ROW_KEYS = ("id", "prediction", "target")


class Request(StrEnum):
    """What is wanted of the model."""

    GENERATE = "generate"  # an answer in its own words
    RANK = "rank"  # the log-likelihood of each option


@dataclass(frozen=True)
class MediaFile:
    """One medium of an item, not read yet.

    Attributes:
        modality: `image`, `audio` or `eeg`.
        name: names it in messages: a path, or a table and its row.
        read: gives the bytes of the file; may raise OSError or DataError.
        ending: of the file's name, without the dot; tells features from pictures.
    """

    modality: str
    name: str
    read: Callable[[], bytes]
    ending: str = ""

    @classmethod
    def of_path(cls, path: Path, modality: str = "image") -> MediaFile:
        """The medium in a file, which need not be there yet."""
        return cls(modality, str(path), path.read_bytes, path.suffix.lower().removeprefix("."))

    def decode(self, data: bytes) -> Any:
        """The medium in `data`: an image in mode L or RGB, or `Features`.

        Raises:
            DataError: the bytes hold no such medium, named and with the reason.
        """
        if not data:
            raise DataError(f"{self.name}: the file is empty")
        if self.ending in FEATURE_FORMATS:
            return Features.of(decode_file(data, self.ending, self.name), self.name)
        if self.modality != "image":
            raise DataError(f"{self.name}: {self.modality} is read as features, in .{' or .'.join(FEATURE_FORMATS)}")
        return decode_file(data, PICTURE, self.name)


@dataclass(frozen=True)
class Item:
    """One thing that is asked.

    Attributes:
        id: unique in its task.
        messages: the dialogue up to the question, placeholders included.
        media: in reading order.
        target: what the scorer compares with, a JSON value.
        options: for `Request.RANK`: the answers whose log-likelihoods are compared.
        labels: what the prediction is if an option wins; the options themselves if there are none.
        fields: further columns for the scorer, JSON values.
        category: for the table by category.
        cluster: items of one image or subject share it, for standard errors; the item's own id if there is none.
    """

    id: str
    messages: tuple[Message, ...]
    media: tuple[MediaFile, ...]
    target: Any
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    category: str = ""
    cluster: str = ""

    def __post_init__(self) -> None:
        clash = sorted(self.fields.keys() & set(ROW_KEYS))
        if clash:
            raise DataError(f"{self.id}: a task field may not be called {clash[0]!r}, the runner writes that one")
        if self.labels and len(self.labels) != len(self.options):
            raise DataError(f"{self.id}: {len(self.options)} options but {len(self.labels)} labels")

    def row(self) -> dict[str, Any]:
        """What the scorer gets beside the prediction."""
        return {"id": self.id, "target": self.target, **self.fields}


@dataclass(frozen=True)
class Task:
    """Items with what is wanted and how it is scored.

    Attributes:
        name: the task's own, as in `--tasks`.
        scorer: the name of the scorer.
        protocol: whose prompts and rules: `official`, `lmms`, `vlmevalkit`.
        items: all items, in the task's order.
        request: what is wanted of the model.
        max_new_tokens: after which an answer is cut.
        per_token: RANK only: compare the mean over an option's tokens and not the sum.
        version: raised when prompts or items change their meaning.
        about: one line for reports.
    """

    name: str
    scorer: str
    protocol: str
    items: tuple[Item, ...]
    request: Request = Request.GENERATE
    max_new_tokens: int = 16
    per_token: bool = False
    version: str = "1"
    about: str = ""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise DataError(f"task {self.name}: the id {item.id!r} occurs twice; answers are joined by id")
            seen.add(item.id)
            if self.request is Request.RANK and len(item.options) < 2:
                raise DataError(f"task {self.name}: {item.id} has {len(item.options)} options; ranking needs 2 or more")
        if not self.items:
            raise DataError(f"task {self.name} holds no items")

    def first(self, count: int | None) -> Task:
        """The task with its first `count` items only; all of them if None."""
        if count is None or count >= len(self.items):
            return self
        return replace(self, items=self.items[:count])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that is asked, but for the bytes of media, which each sample's own key holds."""
        return digest_of([[i.id, i.messages, i.target, i.options, i.labels, i.fields] for i in self.items])


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def ask(text: str, media: Sequence[MediaFile]) -> tuple[Message, ...]:
    """One user turn: the media first, each on a line of its own, unless the text says where they stand."""
    marks = [MEDIA[medium.modality].placeholder for medium in media]
    if any(mark in text for mark in marks):
        return ({"role": "user", "content": text},)
    return ({"role": "user", "content": "".join(f"{mark}\n" for mark in marks) + text},)
