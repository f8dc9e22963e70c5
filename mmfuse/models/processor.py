"""MultimodalProcessor: from messages and media to the batch that `MultimodalLM` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, SiglipImageProcessor
from transformers.image_utils import SizeDict

from mmfuse.errors import ConfigError, DataError, check_keys, unknown
from mmfuse.fusion import IGNORED_LABEL
from mmfuse.models.chat import ChatEncoder, ChatFormat, EncodedSample, Message
from mmfuse.models.media import MEDIA, Features
from mmfuse.sequence import Side, TokenMap

Batch = dict[str, Tensor | TokenMap]
#: Modality, role, segment, turn, document and position of a slot that holds nothing.
_PADDING: Final = np.array([0, 0, -1, -1, -1, 0])


class MultimodalProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat format of a model.

    Args:
        image_processor: a Hugging Face image processor; sizes and normalises. Hugging Face asks for one in any case; a
            model without a tower for images does not use it.
        tokenizer: a Hugging Face tokenizer that knows the placeholder of each modality as one token.
        visual_tokens: short for `media_tokens={"image": visual_tokens}`.
        chat_format: the fields of a `ChatFormat`.
        chat_template: Jinja template for other tools; made from the chat format if not given.
        media_tokens: for each modality of the model, how many tokens of the decoder one medium becomes; an image in 1
            token if not given.
        feature_shapes: for each modality that comes as precomputed features, their shape `[V, D]`.

    Raises:
        ConfigError: modalities that do not exist or do not fit together.
        ValueError: the tokenizer does not know a placeholder or has no padding token.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        visual_tokens: int | None = None,
        chat_format: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        media_tokens: Mapping[str, int] | None = None,
        feature_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        check_keys("chat_format", chat_format or {}, asdict(ChatFormat()))
        style = ChatFormat(**(chat_format or {}))
        super().__init__(image_processor, tokenizer, chat_template=chat_template or style.template())
        if visual_tokens is not None and media_tokens is not None:
            raise ConfigError("give `media_tokens` or, for images alone, `visual_tokens`, but not both")
        self.media_tokens = dict(media_tokens) if media_tokens is not None else {"image": visual_tokens or 1}
        self.feature_shapes = {name: list(shape) for name, shape in (feature_shapes or {}).items()}
        self.chat_format = asdict(style)
        _check_modalities(self.media_tokens, self.feature_shapes)
        for name in self.media_tokens:
            placeholder = MEDIA[name].placeholder
            if tokenizer.convert_tokens_to_ids(placeholder) in (None, tokenizer.unk_token_id):
                raise ValueError(f"the tokenizer does not know {placeholder}; add it with tokenizer.add_special_tokens")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token")
        self._encoder = ChatEncoder(tokenizer, style, self.media_tokens)

    @property
    def visual_tokens(self) -> int:
        """How many tokens an image becomes."""
        return self.media_tokens["image"]

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
        audio: Sequence[Any] | Sequence[Sequence[Any]] = (),
        eeg: Sequence[Any] | Sequence[Sequence[Any]] = (),
        *,
        generation: bool = False,
    ) -> Batch:
        """A batch from conversations.

        Args:
            messages: one conversation or several.
            images: the images of the one conversation, or a list of images for each; likewise `audio` and `eeg`.
            audio: features `[V, D]`.
            eeg: features `[V, D]`.
            generation: prompts for `generate`: each ends with an answer header, is padded on the left, has no labels.

        Returns:
            `input_ids [B, S]`, `tokens` (TokenMap), the media that there are by the model's own keywords, such as
            `pixel_values [N, 3, H, W]` and `audio_features [N, V, D]`, and `labels [B, S]` unless `generation`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        given = {"image": images, "audio": audio, "eeg": eeg}
        media: dict[str, Any] = {
            name: [own] if single else own if len(own) else [()] * len(conversations) for name, own in given.items()
        }
        samples = []
        for i, (conversation, *own) in enumerate(zip(conversations, *media.values(), strict=True)):
            by_modality = dict(zip(media, own, strict=True))
            samples.append(
                self.encoder.encode_messages(conversation, by_modality, generation=generation, key=f"conversation {i}")
            )
        return self.collate(samples, side="left" if generation else "right", supervised=not generation)

    def collate(self, samples: Sequence[EncodedSample], *, side: Side = "right", supervised: bool = True) -> Batch:
        """Pad encoded samples into a batch, a row each; see `collate_rows`."""
        return self.collate_rows([[sample] for sample in samples], side=side, supervised=supervised)

    def collate_rows(
        self, rows: Sequence[Sequence[EncodedSample]], *, side: Side = "right", supervised: bool = True
    ) -> Batch:
        """Pad rows of encoded samples into a batch; labels are the ids of answer tokens and -100 elsewhere.

        The samples of a row stand behind each other, each a document of its own, as `TokenMap.pack` puts them.

        Images may be PIL images of any mode, or arrays: uint8 `[H, W]` or `[H, W, 3]`, or whatever else the image
        processor takes. Features may be arrays or tensors `[V, D]` of any float dtype, or `Features`.

        Raises:
            ValueError: no samples, or features of another shape than the model takes.
            TypeError: an image that is neither a PIL image nor an array or tensor.
        """
        if not rows or not all(rows):
            raise ValueError("a batch needs at least one sample, and so does each of its rows")
        lengths = [sum(map(len, row)) for row in rows]
        table = np.empty((7, len(rows), max(lengths)), dtype=np.int64)
        table[0], table[1:] = self.tokenizer.pad_token_id, _PADDING[:, None, None]
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            at = 0 if side == "right" else table.shape[2] - length
            segments = 0
            for document, sample in enumerate(row):
                own = table[:, number, at : at + len(sample)]
                own[0] = sample.input_ids
                own[1:5] = sample.table
                own[3] += segments
                own[5], own[6] = document, np.arange(len(sample))
                at += len(sample)
                segments += int(sample.table[2].max(initial=-1)) + 1
        ids, modality, role, segment, turn, document, position = torch.from_numpy(table)
        tokens = TokenMap(modality, role, segment, turn, document, position)
        batch: Batch = {"input_ids": ids, "tokens": tokens}
        batch |= self._media_inputs([sample for row in rows for sample in row])
        if supervised:
            batch["labels"] = torch.where(tokens.is_answer, ids, IGNORED_LABEL)
        return batch

    def _media_inputs(self, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
        """The media of all samples in reading order, by the model's keywords."""
        found: dict[str, Tensor] = {}
        for name in self.media_tokens:
            items = [
                (item, sample.key, number)
                for sample in samples
                for number, item in enumerate(sample.media.get(name, ()))
            ]
            shape = self.feature_shapes.get(name)
            if items and shape is not None:
                values = [_feature_values(item, shape, f"{key}, {name} {number}") for item, key, number in items]
                found[MEDIA[name].features] = torch.from_numpy(np.stack(values))
            elif items:
                images = [_checked(item, key) for item, key, _ in items]
                found[cast(str, MEDIA[name].raw)] = _pixel_values(self.image_processor, images)
        return found


def _check_modalities(media_tokens: Mapping[str, int], feature_shapes: Mapping[str, Sequence[int]]) -> None:
    for name in (*media_tokens, *feature_shapes):
        if name not in MEDIA:
            raise ConfigError(unknown("modality", name, MEDIA))
    for name in feature_shapes:
        if name not in media_tokens:
            raise ConfigError(f"feature_shapes names {name}, media_tokens does not")
    for name in media_tokens:
        if MEDIA[name].raw is None and name not in feature_shapes:
            raise ConfigError(f"{name} comes as features; feature_shapes must say in which shape")


def _feature_values(item: Any, shape: Sequence[int], where: str) -> NDArray[np.float32]:
    features = item if isinstance(item, Features) else Features.of(item, where)
    if list(features.values.shape) != list(shape):
        raise DataError(
            f"{features.where}: features have shape {list(features.values.shape)}, the model takes {list(shape)}"
        )
    return features.values


def _checked(image: Any, key: str) -> Any:
    # Image processors also take names of files and addresses; a sample must not make a training job fetch those.
    if isinstance(image, Features):
        raise TypeError(f"{image.where}: the model takes images, and these are features")
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
