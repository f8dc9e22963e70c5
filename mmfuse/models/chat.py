"""From messages or documents to token ids with roles.

A `ChatFormat` is the handful of strings that a chat template is made of. Knowing them, rather than rendering a template
and searching in the result, tells exactly which tokens are prompt (answer headers included) and which are answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mmfuse.errors import unknown
from mmfuse.models.media import MEDIA
from mmfuse.sequence import Modality, Role

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
#: By modality, each in reading order.
Media = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class ChatFormat:
    """The strings around messages. `begin` and `end` also stand around plain documents.

    Attributes:
        begin: opens every sample.
        system, user, assistant: headers; what follows the assistant's header is the answer.
        end: closes every message, and is part of the answer that it closes.
    """

    begin: str = "<|bos|>"
    system: str = "<|system|>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    end: str = "<|end|>"

    def header(self, role: str) -> str:
        headers = {"system": self.system, "user": self.user, "assistant": self.assistant}
        if role not in headers:
            raise ValueError(unknown("message role", role, headers))
        return headers[role]

    def template(self) -> str:
        """The same format as a Jinja chat template, for `apply_chat_template` and other tools."""
        placeholders = ", ".join(f"'{name}': '{medium.placeholder}'" for name, medium in MEDIA.items())
        texts = (self.begin, self.system, self.user, self.assistant, self.end, self.assistant)
        return f"{{% set media = {{{placeholders}}} %}}" + (
            "{{{{ '{}' }}}}{{% for message in messages %}}"
            "{{{{ {{'system': '{}', 'user': '{}', 'assistant': '{}'}}[message['role']] }}}}"
            "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
            "{{% for part in message['content'] %}}"
            "{{{{ media[part['type']] if part['type'] in media else part['text'] }}}}"
            "{{% endfor %}}{{% endif %}}{{{{ '{}' }}}}{{% endfor %}}"
            "{{% if add_generation_prompt %}}{{{{ '{}' }}}}{{% endif %}}"
        ).format(*(_jinja_string(text) for text in texts))


def _jinja_string(text: str) -> str:
    """`text` as it stands between single quotes in a Jinja template."""
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")


@dataclass(frozen=True)
class EncodedSample:
    """One sample as integers, before padding.

    Attributes:
        input_ids: integers `[S]`.
        table: integers `[4, S]`, the rows modality, role, segment and turn of a `TokenMap`.
        media: by modality and in reading order, what the processor takes.
        key: names the sample in messages.
    """

    input_ids: NDArray[np.integer[Any]]
    table: NDArray[np.integer[Any]]
    media: Mapping[str, list[Any]] = field(default_factory=dict)
    key: str = "sample"

    @property
    def images(self) -> list[Any]:
        return self.media.get("image", [])

    def __len__(self) -> int:
        return len(self.input_ids)


class ChatEncoder:
    """Encodes messages and documents with one tokenizer and format.

    Args:
        tokenizer: knows the placeholder of each modality as one token.
        chat_format: the strings around messages.
        media_tokens: for each modality of the model, how many tokens of the decoder one medium becomes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, media_tokens: Mapping[str, int]
    ) -> None:
        self.tokenizer = tokenizer
        self.format = chat_format
        self.media_tokens = dict(media_tokens)
        placeholders = {name: MEDIA[name].placeholder for name in media_tokens}
        self.media_ids = {name: cast(int, tokenizer.convert_tokens_to_ids(text)) for name, text in placeholders.items()}
        self._modality_of = {token_id: name for name, token_id in self.media_ids.items()}
        # The same headers and questions come again and again; tokenising them once makes encoding cheap.
        self._ids = lru_cache(maxsize=1 << 16)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    def __reduce__(self) -> tuple[Any, ...]:
        # The cache stays behind: a worker process that is spawned gets a new one.
        return ChatEncoder, (self.tokenizer, self.format, self.media_tokens)

    def encode_messages(
        self,
        messages: Sequence[Message],
        media: Media | Sequence[Any] = (),
        *,
        generation: bool = False,
        key: str = "sample",
    ) -> EncodedSample:
        """Messages as a sample.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text or parts}`; an image stands as
                `<image>` in a text, or as `{"type": "image"}` among parts, and other modalities likewise.
            media: the media by modality, in reading order; a list holds images.
            generation: end with the header of an answer that is still to come.
            key: names the sample in messages.

        Raises:
            ValueError: an unknown role, a different number of placeholders than media, or a modality that the model
                does not take.
        """
        runs: list[tuple[str, Role]] = [(self.format.begin, Role.PROMPT)]
        for message in messages:
            header = self.format.header(message["role"])
            text = content_text(message["content"], key, self.media_tokens)
            if message["role"] == "assistant":
                runs += [(header, Role.PROMPT), (text + self.format.end, Role.ANSWER)]
            else:
                runs.append((header + text + self.format.end, Role.PROMPT))
        if generation:
            runs.append((self.format.assistant, Role.PROMPT))
        return self._encode(runs, media, key)

    def encode_document(self, text: str, media: Media | Sequence[Any] = (), *, key: str = "sample") -> EncodedSample:
        """A document such as `<image>a caption`, without instruction: all its text is what the model should say."""
        runs = [(self.format.begin, Role.PROMPT), (text + self.format.end, Role.ANSWER)]
        return self._encode(runs, media, key)

    def _encode(self, runs: Sequence[tuple[str, Role]], media: Media | Sequence[Any], key: str) -> EncodedSample:
        columns: list[tuple[int, int, int, int, int, int]] = []
        found = dict.fromkeys(self.media_tokens, 0)
        segment, turn, answered = -1, 0, False
        for text, role in _joined(runs):
            if answered and role != Role.ANSWER:
                turn, answered = turn + 1, False
            run_begins = True
            for token in self._ids(text):
                if token in self._modality_of:
                    name = self._modality_of[token]
                    found[name] += 1
                    segment, run_begins = segment + 1, True
                    modality = Modality[name.upper()]
                    columns.append((token, modality, Role.PROMPT, segment, turn, self.media_tokens[name]))
                    continue
                segment, run_begins = segment + run_begins, False
                columns.append((token, Modality.TEXT, role, segment, turn, 1))
            answered = answered or role == Role.ANSWER
        by_modality = media if isinstance(media, Mapping) else {"image": media}
        _check_media(found, by_modality, key)
        table = np.array(columns, dtype=np.int64).reshape(-1, 6)
        table = np.repeat(table, table[:, 5], axis=0).T
        kept = {name: list(by_modality[name]) for name, count in found.items() if count}
        return EncodedSample(input_ids=table[0], table=table[1:5], media=kept, key=key)


def content_text(
    content: str | Sequence[Mapping[str, Any]], key: str = "sample", modalities: Iterable[str] = tuple(MEDIA)
) -> str:
    """A message's content as one text, with placeholders where media of these modalities stand."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind: Any = part.get("type")
        if kind != "text" and kind not in modalities:
            raise ValueError(f"{key}: {unknown('content part', kind, ('text', *modalities))}")
        texts.append(part["text"] if kind == "text" else MEDIA[kind].placeholder)
    return "".join(texts)


def without_placeholders(text: str) -> str:
    """A text to be shown: no placeholders, no outer whitespace."""
    for medium in MEDIA.values():
        text = text.replace(medium.placeholder, "")
    return text.strip()


def _check_media(found: Mapping[str, int], media: Media, key: str) -> None:
    """Raise ValueError unless as many media are given as placeholders were found, in each modality of the model."""
    for name, given in media.items():
        if len(given) and name not in found:
            taken = ", ".join(found) or "text only"
            raise ValueError(f"{key}: the model takes {taken}, but {len(given)} {MEDIA[name].plural} are given")
    for name, count in found.items():
        given = media.get(name, ())
        if len(given) != count:
            medium = MEDIA[name]
            raise ValueError(
                f"{key}: {count} {medium.placeholder} placeholders in the text but {len(given)} {medium.plural}"
            )


def _joined(runs: Sequence[tuple[str, Role]]) -> list[tuple[str, Role]]:
    """Neighbouring runs of one role as one text, so that tokens may span them as in a rendered template."""
    joined = [runs[0]]
    for (_, before), (text, role) in pairwise(runs):
        if role == before:
            joined[-1] = (joined[-1][0] + text, role)
        else:
            joined.append((text, role))
    return joined
