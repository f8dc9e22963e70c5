"""MultimodalProcessor: from messages and images to the batch that `MultimodalLM` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from mmfuse.errors import check_keys
from mmfuse.fusion import IGNORED_LABEL
from mmfuse.models.chat import IMAGE_TOKEN, ChatEncoder, ChatFormat, EncodedSample, Message
from mmfuse.sequence import Side, TokenMap

Batch = dict[str, Tensor | TokenMap]


class MultimodalProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat format of a model.

    Args:
        image_processor: a Hugging Face image processor; sizes and normalises.
        tokenizer: a Hugging Face tokenizer that knows `<image>` as one token.
        visual_tokens: how many tokens of the decoder an image becomes.
        chat_format: the fields of a `ChatFormat`.
        chat_template: Jinja template for other tools; made from the chat format if not given.

    Raises:
        ValueError: the tokenizer does not know `<image>` or has no padding token.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        visual_tokens: int = 1,
        chat_format: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        check_keys("chat_format", chat_format or {}, asdict(ChatFormat()))
        style = ChatFormat(**(chat_format or {}))
        super().__init__(image_processor, tokenizer, chat_template=chat_template or style.template())
        self.visual_tokens = visual_tokens
        self.chat_format = asdict(style)
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer does not know {IMAGE_TOKEN}; add it with tokenizer.add_special_tokens")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token")
        self._encoder = ChatEncoder(tokenizer, style, visual_tokens)

    def to_dict(self) -> dict[str, Any]:
        # The encoder is made of the other attributes and is no part of what is saved.
        kept = {name: value for name, value in self.__dict__.items() if name != "_encoder"}
        bare = object.__new__(type(self))
        bare.__dict__.update(kept)
        return ProcessorMixin.to_dict(bare)

    @property
    def encoder(self) -> ChatEncoder:
        """Turns messages and documents into unpadded samples."""
        return self._encoder

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        images: Sequence[Any] | Sequence[Sequence[Any]] = (),
        *,
        generation: bool = False,
    ) -> Batch:
        """A batch from conversations.

        Args:
            messages: one conversation or several.
            images: the images of the one conversation, or a list of images for each.
            generation: prompts for `generate`: each ends with an answer header, is padded on the left, has no labels.

        Returns:
            `input_ids [B, S]`, `tokens` (TokenMap), `pixel_values [N, 3, H, W]` if there are images, and
            `labels [B, S]` unless `generation`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        media: Any = [images] if single else (images or [()] * len(conversations))
        samples = [
            self.encoder.encode_messages(conversation, own, generation=generation, key=f"conversation {i}")
            for i, (conversation, own) in enumerate(zip(conversations, media, strict=True))
        ]
        return self.collate(samples, side="left" if generation else "right", supervised=not generation)

    def collate(self, samples: Sequence[EncodedSample], *, side: Side = "right", supervised: bool = True) -> Batch:
        """Pad encoded samples into a batch; labels are the ids of answer tokens and -100 elsewhere."""
        if not samples:
            raise ValueError("a batch needs at least one sample")
        length = max(map(len, samples))
        table = np.empty((6, len(samples), length), dtype=np.int64)
        table[0], table[1:] = self.tokenizer.pad_token_id, np.array([0, 0, -1, -1, 0])[:, None, None]
        for row, sample in enumerate(samples):
            size = len(sample)
            at = slice(0, size) if side == "right" else slice(length - size, length)
            table[0, row, at] = sample.input_ids
            table[1:5, row, at] = sample.table
            table[5, row, at] = np.arange(size)
        ids, modality, role, segment, turn, position = torch.from_numpy(table)
        tokens = TokenMap(modality, role, segment, turn, torch.where(turn >= 0, 0, -1), position)
        batch: Batch = {"input_ids": ids, "tokens": tokens}
        images = [image for sample in samples for image in sample.images]
        if images:
            batch["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        if supervised:
            batch["labels"] = torch.where(tokens.is_answer, ids, IGNORED_LABEL)
        return batch
