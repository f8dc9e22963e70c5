"""The processor of an adopted model: chats through the model's own template and its own processor.

What the model is taught to say is found in the template: by its `{% generation %}` markers, or, where it has none, as
what an answer adds behind the generation prompt. Images are expanded by the model's own processor, so the tokens of
the answers are looked up in what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PaliGemmaProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from mmfuse.errors import ConfigError, DataError, unknown
from mmfuse.fusion import IGNORED_LABEL
from mmfuse.models.chat import ROLES, ChatFormat, Media, Message
from mmfuse.models.media import MEDIA
from mmfuse.sequence import Side

_IMAGE = MEDIA["image"].placeholder
#: From a text and the sizes (width, height) of its images to the number of tokens.
Measure = Callable[[str, tuple[tuple[int, int], ...]], int]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text.

    Its length is that of its tokens in the processor's output; it is counted when it is first asked for.

    Attributes:
        text: by the template, images as their placeholder.
        answers: where answers stand in it, `(start, end)` in characters.
        media: the images in reading order, under `image`.
        key: names the sample in messages.
        measure: counts tokens.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    media: Mapping[str, list[Any]]
    key: str
    measure: Measure

    @cached_property
    def length(self) -> int:
        """Tokens in the processor's output."""
        return self.measure(self.text, tuple(map(_size, self.images)))

    def __len__(self) -> int:
        return self.length

    @property
    def images(self) -> list[Any]:
        return self.media.get("image", [])


class ChatRenderer:
    """Messages to text by a processor's chat template.

    Args:
        processor: of a Hugging Face vision-language model.

    Raises:
        ConfigError: it has no chat template.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        if not processor.chat_template and not isinstance(processor, PaliGemmaProcessor):
            raise ConfigError(
                f"{type(processor).__name__} has no chat template; put a chat_template.jinja beside the model's files"
            )
        self._image_tokens = lru_cache(maxsize=1 << 12)(self._count_image_tokens)
        #: Only `end` is asked for, and means the end of an answer.
        self.format = ChatFormat(end=str(tokenizer_of(processor).eos_token))

    def encode_messages(
        self,
        messages: Sequence[Message],
        media: Media | Sequence[Any] = (),
        *,
        generation: bool = False,
        key: str = "sample",
    ) -> RenderedChat:
        """See `ChatEncoder.encode_messages`.

        Raises:
            ValueError: an unknown role, another number of placeholders than images, media other than images, or a
                template in which answers cannot be told from prompts.
        """
        by_modality = media if isinstance(media, Mapping) else {"image": media}
        for name, items in by_modality.items():
            if name != "image" and len(items):
                raise ValueError(f"{key}: the model takes image, but {len(items)} {MEDIA[name].plural} are given")
        chat = [_in_parts(message, key) for message in messages]
        images = list(by_modality.get("image", ()))
        count = sum(part["type"] == "image" for message in chat for part in message["content"])
        if count != len(images):
            raise ValueError(f"{key}: {count} {_IMAGE} placeholders in the text but {len(images)} images")
        text = self._render(chat, generation)
        return RenderedChat(
            text, self._answers(chat, text, key), {"image": images} if images else {}, key, self.count_tokens
        )

    def encode_document(self, text: str, media: Media | Sequence[Any] = (), *, key: str = "sample") -> RenderedChat:
        """Not supported: an adopted model has a template for chats alone.

        Raises:
            DataError: always.
        """
        raise DataError(f"{key}: an adopted model is tuned on chats (`messages`), and this is a document")

    def __reduce__(self) -> tuple[Any, ...]:
        # The cache stays behind: a worker process that is spawned gets a new one.
        return ChatRenderer, (self.processor,)

    def count_tokens(self, text: str, sizes: tuple[tuple[int, int], ...]) -> int:
        """Count the tokens of a rendered text with images of these sizes (width, height)."""
        return len(tokenizer_of(self.processor)(text)["input_ids"]) + (self._image_tokens(sizes) if sizes else 0)

    def _count_image_tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        """How many tokens more than placeholders the processor makes of images of these sizes together."""
        blank = [Image.new("RGB", size) for size in sizes]
        text = placeholder_of(self.processor) * len(sizes)
        made: Any = cast(Any, self.processor)(images=[blank], text=[text], return_tensors="pt")
        return int(made["input_ids"].shape[1]) - len(tokenizer_of(self.processor)(text)["input_ids"])

    def _render(self, chat: Sequence[Message], generation: bool) -> str:
        if not self.processor.chat_template:  # PaliGemma: a prefix and its answer, without headers
            return "".join(_plain(message) for message in chat)
        conversation: Any = list(chat)
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=generation, tokenize=False)
        return str(text)

    def _answers(self, chat: Sequence[Message], text: str, key: str) -> tuple[tuple[int, int], ...]:
        template = self.processor.chat_template
        if isinstance(template, str) and "{% generation" in template.replace("{%- ", "{% "):
            named: Any = tokenizer_of(self.processor).special_tokens_map
            conversations: Any = [list(chat)]
            rendered: Any = render_jinja_template(
                conversations, chat_template=template, return_assistant_tokens_mask=True, **named
            )
            return _joined(rendered[1][0])
        answers = []
        for number, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before, after = self._render(chat[:number], True), self._render(chat[: number + 1], False)
            if not text.startswith(after) or not after.startswith(before):
                raise ValueError(
                    f"{key}: the chat template writes earlier turns anew behind later ones, so answers cannot be told "
                    "from prompts; mark them with {% generation %} in the template"
                )
            answers.append((len(before), len(after.rstrip())))
        return tuple(answers)


class AdoptedProcessor:
    """A Hugging Face processor with the methods that training and evaluation call.

    Args:
        processor: of the adopted model.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.own = processor
        self.encoder = ChatRenderer(processor)
        self.feature_shapes: dict[str, list[int]] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""
        return tokenizer_of(self.own)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model's own processor."""
        self.own.save_pretrained(folder)

    def __call__(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        eeg: Sequence[Any] = (),
        *,
        generation: bool = False,
    ) -> dict[str, Tensor]:
        """The batch of one conversation, see `MultimodalProcessor`."""
        media = {"image": images, "audio": audio, "eeg": eeg}
        chat = self.encoder.encode_messages(messages, media, generation=generation, key="conversation")
        return self.collate([chat], side="left" if generation else "right", supervised=not generation)

    def collate(
        self, samples: Sequence[RenderedChat], *, side: Side = "right", supervised: bool = True
    ) -> dict[str, Tensor]:
        """What the model's own processor makes of the chats, and `labels [B, S]`: the ids of answers, -100 elsewhere.

        Raises:
            ValueError: no samples, or a chat that the processor cannot hold.
        """
        if not samples:
            raise ValueError("a batch needs at least one sample")
        texts = [sample.text for sample in samples]
        options: dict[str, Any] = {}
        if supervised and isinstance(self.own, PaliGemmaProcessor):
            texts, options["suffix"] = _prefixes_and_suffixes(samples, str(self.tokenizer.eos_token))
        batch = self._processed(samples, texts, side, options)
        given = batch.pop("labels", None)
        if not supervised:
            return batch
        if given is not None:
            batch["labels"] = given
            return batch
        is_answer = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, sample in enumerate(samples):
            live = batch["attention_mask"][row].nonzero().flatten()
            found = self._answer_tokens(sample, batch["input_ids"][row, live].tolist())
            is_answer[row, live[found]] = True
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, IGNORED_LABEL)
        return batch

    def collate_rows(self, rows: Sequence[Sequence[RenderedChat]], *, supervised: bool = True) -> dict[str, Tensor]:
        """What `collate` makes of the chats of all rows and, where any row has several, `rows [N]`: the row of each.

        The model puts them behind each other when it `prepares` the batch: what its processor gives holds one chat a
        row, and so do its own rules for positions.
        """
        batch = self.collate([chat for row in rows for chat in row], supervised=supervised)
        if any(len(row) > 1 for row in rows):
            batch["rows"] = torch.tensor([number for number, row in enumerate(rows) for _ in row])
        return batch

    def _processed(
        self, samples: Sequence[RenderedChat], texts: list[str], side: Side, options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        images: Any = [list(sample.images) for sample in samples]
        images = images if any(images) else None
        made = self.own(images=images, text=texts, padding=True, padding_side=side, return_tensors="pt", **options)
        return {name: cast(Tensor, value) for name, value in made.items()}

    def _answer_tokens(self, sample: RenderedChat, ids: list[int]) -> list[int]:
        """Where the tokens of the answers stand in `ids`, in which each placeholder was expanded."""
        coded = self.tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
        placeholder = cast(int, self.tokenizer.convert_tokens_to_ids(placeholder_of(self.own)))
        found: list[int] = []
        run: list[tuple[int, bool]] = []
        at = 0
        pairs = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        for token, (start, end) in (*pairs, (placeholder, (0, 0))):
            if token != placeholder:
                run.append((token, any(start < last and end > first for first, last in sample.answers)))
                continue
            if run:
                at = _find([token for token, _ in run], ids, at, sample.key)
                found += [at + place for place, (_, is_answer) in enumerate(run) if is_answer]
                at, run = at + len(run), []
        return found


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor."""
    return cast(PreTrainedTokenizerBase, cast(Any, processor).tokenizer)


def placeholder_of(processor: ProcessorMixin) -> str:
    """What stands for an image in the text of a processor's chat template."""
    for name in ("boi_token", "image_token"):
        if (text := getattr(processor, name, None)) is not None:
            return str(text)
    raise ConfigError(f"{type(processor).__name__} does not say what stands for an image in its texts")


def _size(image: Any) -> tuple[int, int]:
    """Width and height of a PIL image, an array `[H, W]` or `[H, W, 3]`, or what knows its `size` as PIL does."""
    if isinstance(image, (np.ndarray, Tensor)):
        height, width = image.shape[:2]
        return int(width), int(height)
    width, height = image.size
    return int(width), int(height)


def _find(run: list[int], ids: list[int], start: int, key: str) -> int:
    """The first place from `start` on at which `run` stands in `ids`."""
    for at in range(start, len(ids) - len(run) + 1):
        if ids[at] == run[0] and ids[at : at + len(run)] == run:
            return at
    raise ValueError(
        f"{key}: the text between images has other tokens in the processor's output than in the chat template's text, "
        "so the tokens of the answers cannot be found (was the sample cut off?)"
    )


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans that touch as one: a template may mark an answer and its end apart."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def _in_parts(message: Message, key: str) -> dict[str, Any]:
    """A message whose content is parts; `<image>` in a text is an image."""
    if message["role"] not in ROLES:
        raise ValueError(f"{key}: {unknown('message role', message['role'], ROLES)}")
    content = message["content"]
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part.get("type") == "image":
            parts.append({"type": "image"})
            continue
        if part.get("type") != "text":
            raise ValueError(f"{key}: {unknown('content part', part.get('type'), ('text', 'image'))}")
        pieces = str(part["text"]).split(_IMAGE)
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] * (number > 0)
            text = piece.removeprefix("\n") if number else piece
            parts += [{"type": "text", "text": text}] * bool(text)
    return {"role": message["role"], "content": parts}


def _plain(message: Message) -> str:
    return "".join(_IMAGE if part["type"] == "image" else part["text"] for part in message["content"])


def _prefixes_and_suffixes(samples: Sequence[RenderedChat], end: str) -> tuple[list[str], list[str]]:
    """What PaliGemma's processor asks for: all before the one answer, and the answer without its end token."""
    prefixes, suffixes = [], []
    for sample in samples:
        if len(sample.answers) != 1:
            raise ValueError(
                f"{sample.key}: PaliGemma takes a question and one answer, this chat has {len(sample.answers)}"
            )
        (start, stop), text = sample.answers[0], sample.text
        prefixes.append(text[:start])
        suffixes.append(text[start:stop].strip().removesuffix(end).strip())
    return prefixes, suffixes
