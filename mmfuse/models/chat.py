"""From messages or documents to token ids with roles.

A `ChatFormat` is the handful of strings that a chat template is made of. Knowing them, rather than rendering a template
and searching in the result, tells exactly which tokens are prompt (answer headers included) and which are answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mmfuse.errors import unknown
from mmfuse.sequence import Modality, Role

Message = Mapping[str, Any]

IMAGE_TOKEN = "<image>"


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
        texts = (self.begin, self.system, self.user, self.assistant, IMAGE_TOKEN, self.end, self.assistant)
        return (
            "{{{{ '{}' }}}}{{% for message in messages %}}"
            "{{{{ {{'system': '{}', 'user': '{}', 'assistant': '{}'}}[message['role']] }}}}"
            "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
            "{{% for part in message['content'] %}}"
            "{{{{ '{}' if part['type'] == 'image' else part['text'] }}}}"
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
        input_ids: int64 `[S]`.
        table: int64 `[4, S]`, the rows modality, role, segment and turn of a `TokenMap`.
        images: what the image processor takes, in reading order.
        key: names the sample in messages.
    """

    input_ids: NDArray[np.int64]
    table: NDArray[np.int64]
    images: list[Any] = field(default_factory=list)
    key: str = "sample"

    def __len__(self) -> int:
        return len(self.input_ids)


class ChatEncoder:
    """Encodes messages and documents with one tokenizer and format.

    Args:
        tokenizer: knows `<image>` as one token.
        chat_format: the strings around messages.
        visual_tokens: how many tokens of the decoder an image becomes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, visual_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.format = chat_format
        self.visual_tokens = visual_tokens
        self.image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        # The same headers and questions come again and again; tokenising them once makes encoding cheap.
        self._ids = lru_cache(maxsize=1 << 16)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    def __reduce__(self) -> tuple[Any, ...]:
        # The cache stays behind: a worker process that is spawned gets a new one.
        return ChatEncoder, (self.tokenizer, self.format, self.visual_tokens)

    def encode_messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), *, generation: bool = False, key: str = "sample"
    ) -> EncodedSample:
        """Messages as a sample.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text or parts}`; an image stands as
                `<image>` in a text, or as `{"type": "image"}` among parts.
            images: the images, in reading order.
            generation: end with the header of an answer that is still to come.
            key: names the sample in messages.

        Raises:
            ValueError: an unknown role, or a different number of placeholders than images.
        """
        runs: list[tuple[str, Role]] = [(self.format.begin, Role.PROMPT)]
        for message in messages:
            header, text = self.format.header(message["role"]), content_text(message["content"], key)
            if message["role"] == "assistant":
                runs += [(header, Role.PROMPT), (text + self.format.end, Role.ANSWER)]
            else:
                runs.append((header + text + self.format.end, Role.PROMPT))
        if generation:
            runs.append((self.format.assistant, Role.PROMPT))
        return self._encode(runs, images, key)

    def encode_document(self, text: str, images: Sequence[Any] = (), *, key: str = "sample") -> EncodedSample:
        """A document such as `<image>a caption`, without instruction: all its text is what the model should say."""
        runs = [(self.format.begin, Role.PROMPT), (text + self.format.end, Role.ANSWER)]
        return self._encode(runs, images, key)

    def _encode(self, runs: Sequence[tuple[str, Role]], images: Sequence[Any], key: str) -> EncodedSample:
        columns: list[tuple[int, int, int, int, int, int]] = []
        segment, turn, found, answered = -1, 0, 0, False
        for text, role in _joined(runs):
            if answered and role != Role.ANSWER:
                turn, answered = turn + 1, False
            run_begins = True
            for token in self._ids(text):
                if token == self.image_id:
                    segment, found, run_begins = segment + 1, found + 1, True
                    columns.append((token, Modality.IMAGE, Role.PROMPT, segment, turn, self.visual_tokens))
                    continue
                segment, run_begins = segment + run_begins, False
                columns.append((token, Modality.TEXT, role, segment, turn, 1))
            answered = answered or role == Role.ANSWER
        if found != len(images):
            raise ValueError(f"{key}: {found} {IMAGE_TOKEN} placeholders in the text but {len(images)} images")
        table = np.array(columns, dtype=np.int64).reshape(-1, 6)
        table = np.repeat(table, table[:, 5], axis=0).T
        return EncodedSample(input_ids=table[0], table=table[1:5], images=list(images), key=key)


def content_text(content: str | Sequence[Mapping[str, Any]], key: str = "sample") -> str:
    """A message's content as one text with `<image>` where images stand."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "image"):
            raise ValueError(f"{key}: {unknown('content part', kind, ('text', 'image'))}")
        texts.append(IMAGE_TOKEN if kind == "image" else part["text"])
    return "".join(texts)


def _joined(runs: Sequence[tuple[str, Role]]) -> list[tuple[str, Role]]:
    """Neighbouring runs of one role as one text, so that tokens may span them as in a rendered template."""
    joined = [runs[0]]
    for (_, before), (text, role) in pairwise(runs):
        if role == before:
            joined[-1] = (joined[-1][0] + text, role)
        else:
            joined.append((text, role))
    return joined
