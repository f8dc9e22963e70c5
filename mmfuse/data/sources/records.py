"""Records: LLaVA conversations, chat messages and documents as one thing, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mmfuse.errors import DataError, unknown
from mmfuse.models.chat import Message
from mmfuse.models.media import MEDIA

_SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLES: Final = ("system", "user", "assistant")
_BODIES: Final = ("messages", "conversations", "text")
_UNREAD: Final = ("video", "videos")
#: Under which keys a record names the files of its media.
MEDIA_KEYS: Final = {"image": ("image", "images"), "audio": ("audio", "audios"), "eeg": ("eeg", "eegs")}
_READ: Final = frozenset((*_BODIES, *(key for keys in MEDIA_KEYS.values() for key in keys)))


@dataclass(frozen=True)
class Record:
    """A sample whose media are still names.

    Attributes:
        messages, text: exactly one is given, see `Sample`.
        media: for every modality the file names, in reading order.
        info: the other fields.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    media: dict[str, tuple[str, ...]]
    info: dict[str, Any]


def parse_record(raw: object, where: str) -> Record:
    """Check a record and bring it to one form.

    Args:
        raw: what JSON gave: an object with `messages`, `conversations` (LLaVA) or `text`, and the names of its media:
            `image` or `images`, `audio` or `audios`, `eeg` or `eegs`.
        where: names the record in messages.

    Raises:
        DataError: naming the record, what it has and what was expected.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a record is an object with one of {', '.join(_BODIES)}, got {_kind(raw)}")
    bodies = [name for name in _BODIES if name in raw]
    if len(bodies) != 1:
        found = ", ".join(map(str, raw)) or "no keys"
        raise DataError(f"{where}: expected one of {', '.join(_BODIES)}; the record has {found}")
    for name in _UNREAD:
        if raw.get(name):
            raise DataError(
                f"{where}: the record has {name!r}, which is not read; samples hold text, {', '.join(MEDIA)}"
            )
    body = raw[bodies[0]]
    messages: tuple[Message, ...] | None = None
    if bodies[0] == "text":
        if not isinstance(body, str):
            raise DataError(f"{where}: 'text' must be a string, got {_kind(body)}")
    else:
        if not isinstance(body, list) or not body:
            raise DataError(f"{where}: {bodies[0]!r} must be a list with at least one message, got {_kind(body)}")
        one = _message if bodies[0] == "messages" else _utterance
        messages = tuple(one(message, f"{where}: {bodies[0]}[{number}]") for number, message in enumerate(body))
    contents = [message["content"] for message in messages or ()]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    media = {modality: _file_names(modality, raw, parts, where) for modality in MEDIA_KEYS}
    info = {name: value for name, value in raw.items() if name not in _READ}
    return Record(messages, body if messages is None else None, media, info)


def _utterance(raw: object, where: str) -> Message:
    """LLaVA: `{"from": "human", "value": "..."}`."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("value"), str) or "from" not in raw:
        raise DataError(f"{where}: expected {{'from': 'human' | 'gpt' | 'system', 'value': text}}, got {_kind(raw)}")
    if raw["from"] not in tuple(_SPEAKERS):  # also of a value that cannot be hashed
        raise DataError(f"{where}: {unknown('speaker', raw['from'], _SPEAKERS)}")
    return {"role": _SPEAKERS[raw["from"]], "content": raw["value"]}


def _message(raw: object, where: str) -> Message:
    if not isinstance(raw, Mapping) or "role" not in raw or not isinstance(raw.get("content"), (str, list)):
        raise DataError(f"{where}: expected {{'role': ..., 'content': text or parts}}, got {_kind(raw)}")
    if raw["role"] not in _ROLES:
        raise DataError(f"{where}: {unknown('message role', raw['role'], _ROLES)}")
    if isinstance(raw["content"], list):
        for part in raw["content"]:
            kind = part.get("type") if isinstance(part, Mapping) else part
            if kind not in ("text", *MEDIA):
                raise DataError(f"{where}: {unknown('content part', kind, ('text', *MEDIA))}")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise DataError(f"{where}: a content part of type 'text' needs a string 'text', got {_kind(part)}")
    return {"role": raw["role"], "content": raw["content"]}


def _file_names(
    modality: str, raw: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], where: str
) -> tuple[str, ...]:
    """Names stand beside the messages (`image` or `images`), or all in the content parts."""
    keys = MEDIA_KEYS[modality]
    beside = [name for name in keys if raw.get(name)]
    inside = [part.get(modality, part.get("path")) for part in parts if part["type"] == modality]
    if len(beside) + any(name is not None for name in inside) > 1:
        places = ", ".join(map(repr, keys))
        raise DataError(
            f"{where}: {MEDIA[modality].plural} are named twice; give them in one of {places} and content parts"
        )
    names = raw[beside[0]] if beside else [] if all(name is None for name in inside) else inside
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: {MEDIA[modality].plural} must be file names, got {names!r:.80}")
    return tuple(names)


def _kind(value: object) -> str:
    """What a message calls a wrong value."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{value!r:.60}"
