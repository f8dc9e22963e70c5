"""MultimodalProcessor: from messages and images to the batch that `MultimodalLM` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, SiglipImageProcessor
from transformers.image_utils import SizeDict

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
        """Pad encoded samples into a batch; labels are the ids of answer tokens and -100 elsewhere.

        Images may be PIL images of any mode, or arrays: uint8 `[H, W]` or `[H, W, 3]`, or whatever else the image
        processor takes.

        Raises:
            ValueError: no samples.
            TypeError: an image that is neither a PIL image nor an array or tensor.
        """
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
        images = [_checked(image, sample.key) for sample in samples for image in sample.images]
        if images:
            batch["pixel_values"] = _pixel_values(self.image_processor, images)
        if supervised:
            batch["labels"] = torch.where(tokens.is_answer, ids, IGNORED_LABEL)
        return batch


def _checked(image: Any, key: str) -> Any:
    # Image processors also take names of files and addresses; a sample must not make a training job fetch those.
    if not isinstance(image, (Image.Image, np.ndarray, Tensor)):
        raise TypeError(f"{key}: an image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    return image


def _pixel_values(processor: BaseImageProcessor, images: Sequence[Any]) -> Tensor:
    """`[N, 3, H, W]` float32: exactly what the processor makes of the images, faster where they share a size.

    Hugging Face's processors treat images one by one on the CPU, which for small images costs more than the pixels do.
    """
    if not _only_resizes_and_normalizes(processor):
        three = [np.stack([x] * 3, axis=-1) if isinstance(x, np.ndarray) and x.ndim == 2 else x for x in images]
        pixels: Tensor = processor(three, return_tensors="pt")["pixel_values"]
        return pixels
    arrays = [_array(processor, image) for image in images]
    groups: dict[tuple[tuple[int, ...], np.dtype[Any]], list[int]] = {}
    for index, array in enumerate(arrays):
        groups.setdefault((array.shape, array.dtype), []).append(index)
    parts = [_normalized(processor, np.stack([arrays[index] for index in members])) for members in groups.values()]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([index for members in groups.values() for index in members])
    return torch.cat(parts)[order.argsort()]


def _only_resizes_and_normalizes(processor: BaseImageProcessor) -> TypeGuard[SiglipImageProcessor]:
    """Whether its steps are those of `_normalized`; a subclass may have others."""
    if type(processor) is not SiglipImageProcessor:
        return False
    steps = [processor.do_convert_rgb, processor.do_resize, processor.do_rescale, processor.do_normalize]
    one_size = isinstance(processor.size, SizeDict) and processor.size.height and processor.size.width
    more = (getattr(processor, name, None) for name in ("do_center_crop", "do_pad"))
    return all(steps) and bool(one_size) and not any(more)


def _array(processor: SiglipImageProcessor, image: Any) -> NDArray[Any]:
    """`[H, W]` for grey images, `[H, W, 3]` for all others."""
    if isinstance(image, Image.Image) and image.mode in ("RGB", "L") and image.info.get("transparency") is None:
        return np.asarray(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] in ((), (3,)):
        return image
    array: NDArray[Any] = processor.process_image(image, do_convert_rgb=True).permute(1, 2, 0).numpy()
    return array


def _normalized(processor: SiglipImageProcessor, stack: NDArray[Any]) -> Tensor:
    """`[n, h, w]` or `[n, h, w, 3]` to `[n, 3, H, W]`, by the processor's own steps."""
    pixels = torch.from_numpy(stack)
    pixels = pixels[:, None].repeat(1, 3, 1, 1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    pixels = processor.resize(pixels, cast(SizeDict, processor.size), processor.resample)
    # The processor remembers what it computed from them, which takes tuples (its annotations say lists).
    mean: Any = tuple(processor.image_mean)
    std: Any = tuple(processor.image_std)
    normalized: Tensor = processor.rescale_and_normalize(pixels, True, processor.rescale_factor, True, mean, std)
    return normalized
