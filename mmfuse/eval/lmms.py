"""A plugin for lmms-eval: `lmms_eval --model mmfuse --model_args pretrained=runs/aki/model …` runs a checkpoint there.

lmms-eval finds `manifests` through the entry points of the group `lmms_eval.models`. Nothing here imports lmms-eval
before it does; the class that it makes is in `mmfuse.eval.lmms_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmfuse.data.decoders import PICTURE, decode_file
from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.tasks.items import Item, MediaFile
from mmfuse.models.media import MEDIA

#: Tokens of an answer where a task says nothing.
MAX_NEW_TOKENS = 128
#: What greedy decoding has no use for; any other value than these is refused.
_GREEDY: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "num_beams": (1, None),
    "temperature": (0, None),
    "top_p": (0, 1, None),
    "top_k": (0, 1, None),
}


def manifests() -> Any:
    """What lmms-eval asks a plugin for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmfuse", chat_class_path="mmfuse.eval.lmms_model.MmfuseChat")


@dataclass(frozen=True)
class Asked:
    """One request of lmms-eval.

    Attributes:
        item: what is asked.
        media: decoded.
        max_new_tokens: after which an answer is cut.
        until: texts that end an answer.
    """

    item: Item
    media: tuple[Any, ...]
    max_new_tokens: int = MAX_NEW_TOKENS
    until: tuple[str, ...] = ()


def unpack(arguments: Sequence[Any]) -> tuple[str, Callable[..., Any], Mapping[str, Any], Any, str, str]:
    """Text, messages of a document, generation settings, and the document's id, task and split.

    lmms-eval documents five fields and passes six, and their order has changed: they are told apart by type. The last
    three are in that order in all versions.

    Raises:
        ConfigError: a field is missing, as in a version of lmms-eval that this plugin does not know.
    """
    *front, doc_id, task, split = arguments
    text = next((part for part in front if isinstance(part, str)), "")
    messages = next((part for part in front if callable(part)), None)
    settings = next((part for part in front if isinstance(part, Mapping)), None)
    if messages is None or settings is None or not isinstance(task, str) or not isinstance(split, str):
        kinds = ", ".join(type(part).__name__ for part in arguments)
        raise ConfigError(f"this version of lmms-eval passes requests of ({kinds}), which the plugin does not know")
    return text, messages, settings, doc_id, task, split


def asked(name: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Asked:
    """A request from the messages of a document.

    Args:
        name: of the request, for errors.
        messages: `{"role", "content"}`, where content is text or a list of parts `{"type": "text" | "image", …}`.
        settings: the task's `generation_kwargs`.

    Raises:
        DataError: another kind of part, or an image that cannot be read.
        ConfigError: settings that are not greedy.
    """
    media: list[Any] = []
    files: list[MediaFile] = []
    turns = []
    for message in messages:
        text = ""
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "image":
                label = f"{name}, image {len(media)}"
                media.append(_image(part.get("url", part.get("image")), label))
                files.append(MediaFile("image", label, bytes))
                text += f"{MEDIA['image'].placeholder}\n"
            else:
                raise DataError(f"{name}: messages hold {part['type']!r}; mmfuse takes text and images from lmms-eval")
        turns.append({"role": message["role"], "content": text})
    until = settings.get("until") or ()
    return Asked(
        Item(name, tuple(turns), tuple(files), ""),
        tuple(media),
        _greedy(settings),
        (until,) if isinstance(until, str) else tuple(until),
    )


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of `until`."""
    ends = [text.index(end) for end in until if end and end in text]
    return text[: min(ends)] if ends else text


def _greedy(settings: Mapping[str, Any]) -> int:
    for key, allowed in _GREEDY.items():
        if key in settings and settings[key] not in allowed:
            raise ConfigError(f"generation_kwargs: {key}={settings[key]!r}, but mmfuse answers greedily")
    return int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS)


def _image(given: Any, label: str) -> Any:
    if isinstance(given, Image.Image):
        return given if given.mode in ("L", "RGB") else given.convert("RGB")
    if isinstance(given, str | Path) and Path(given).is_file():
        return decode_file(Path(given).read_bytes(), PICTURE, label)
    raise DataError(f"{label}: expected a picture or the path of a file, got {type(given).__name__}")
