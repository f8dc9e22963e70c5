"""A sample: what every source yields, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmfuse.errors import DataError
from mmfuse.models.chat import ChatEncoder, EncodedSample, Media, Message, content_text
from mmfuse.models.media import MEDIA, Features


@dataclass(frozen=True)
class Sample:
    """One conversation or document with its media; exactly one of `messages` and `text` is given.

    Attributes:
        key: names the sample in messages: `train-0001.tar:align-000003` or `chats.json[12]`.
        images: decoded, in reading order: PIL images (RGB or L), uint8 arrays, or `Features` of a model that takes
            images as such.
        messages: a chat with the roles system, user and assistant.
        text: a document such as `<image>a caption`.
        info: every other field of the record.
        audio: `Features` in reading order.
        eeg: `Features` in reading order.

    Raises:
        DataError: both or neither of `messages` and `text`.
    """

    key: str
    images: tuple[Any, ...]
    messages: tuple[Message, ...] | None
    text: str | None
    info: Mapping[str, Any]
    audio: tuple[Any, ...] = ()
    eeg: tuple[Any, ...] = ()

    @property
    def media(self) -> Media:
        """All media by modality."""
        return {"image": self.images, "audio": self.audio, "eeg": self.eeg}

    @property
    def pictures(self) -> tuple[Any, ...]:
        """The images that can be looked at, which features cannot."""
        return tuple(image for image in self.images if not isinstance(image, Features))

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise DataError(f"{self.key}: a sample has either messages or a text")


def encode_sample(sample: Sample, encoder: ChatEncoder, *, generation: bool = False) -> EncodedSample:
    """Encode messages as a chat and a text as a document.

    Args:
        sample: what to encode.
        encoder: knows tokenizer and chat format.
        generation: end with the header of an answer that is still to come; for messages only.

    Raises:
        DataError: naming the sample: as many placeholders as media are needed, roles must be known.
    """
    try:
        if sample.messages is not None:
            return encoder.encode_messages(sample.messages, sample.media, generation=generation, key=sample.key)
        if generation:
            raise DataError("generation needs messages; this sample is a document")
        return encoder.encode_document(sample.text or "", sample.media, key=sample.key)
    except KeyError as error:
        raise DataError(f"{sample.key}: a message or content part lacks {error}") from error
    except ValueError as error:
        message = str(error)
        raise DataError(message if message.startswith(sample.key) else f"{sample.key}: {message}") from error


def split_answer(sample: Sample) -> tuple[Sample, str]:
    """Take the last answer off a sample, for evaluation.

    Returns:
        The sample without its last message, and the text of that message.

    Raises:
        DataError: the sample is a document, its last message is no assistant's, or that message holds media.
    """
    if sample.messages is None:
        raise DataError(f"{sample.key}: a document has no answer to split off; evaluation needs messages")
    if not sample.messages or sample.messages[-1]["role"] != "assistant":
        last = repr(sample.messages[-1]["role"]) if sample.messages else "missing"
        raise DataError(f"{sample.key}: the last message must be the assistant's, its role is {last}")
    answer = content_text(sample.messages[-1]["content"], sample.key)
    for name, items in sample.media.items():
        if items and MEDIA[name].placeholder in answer:
            held = MEDIA[name].placeholder
            raise DataError(f"{sample.key}: the last answer holds {held}; answers are compared as text")
    return replace(sample, messages=sample.messages[:-1]), answer
