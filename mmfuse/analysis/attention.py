"""Where a model looks while it answers, and how much image and question attend to each other.

Attention shows which states a layer mixed, not why an answer was given: read the maps beside the blind score.

Shapes: `L` layers, `T` answer tokens, `V` visual tokens of a sample, `S` slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmfuse.analysis.mode import evaluation_mode
from mmfuse.data.samples import Sample, encode_sample
from mmfuse.models import AdoptedLM, MultimodalLM, MultimodalProcessor
from mmfuse.models.chat import content_text, without_placeholders
from mmfuse.sequence import Modality, TokenMap


@dataclass(frozen=True)
class SampleAttention:
    """Attention in one sample, averaged over heads; float32 on the CPU.

    Attributes:
        to_image: `[L, T, V]`, what the row that predicts answer token t gives to each visual token. The rest of its
            attention goes to text, so a row sums to 1 or less.
        question_to_image: `[L]`, the mean attention mass that prompt text behind an image gives to images.
        image_to_question: `[L]`, the mean mass that media give to prompt text of their own turn behind them: exactly 0
            under causal attention, and what modality-mutual attention adds. NaN without such text, as the other is
            without text behind an image.
        answer_ids: int64 `[T]`, the answer tokens.
    """

    to_image: Tensor
    question_to_image: Tensor
    image_to_question: Tensor
    answer_ids: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Attention in the samples of a batch.

    Attributes:
        layers: the decoder layers that the first axis of the maps lists.
        grid: rows and columns of an image's visual tokens, in reading order.
        samples: in the order of the batch.
    """

    layers: tuple[int, ...]
    grid: tuple[int, int]
    samples: tuple[SampleAttention, ...]


@dataclass(frozen=True)
class AttentionExample:
    """A question about one image with the attention of its answer, ready to be drawn.

    Attributes:
        key: of the sample.
        image: as the sample holds it.
        question: the last text from the user.
        tokens: the answer tokens as text, without the one that ends it.
        layers: the decoder layers of the first axis of `maps`.
        maps: `[L, T, rows, cols]`, `SampleAttention.to_image` on the image's grid.
    """

    key: str
    image: Any
    question: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    maps: Tensor


def visual_grid(model: MultimodalLM) -> tuple[int, int]:
    """Rows and columns of the visual tokens that an image becomes.

    Raises:
        ValueError: the model has no encoder for images, or the visual tokens are not its grid, as behind a resampler or
            a pooling connector, or with a CLS token among them: they have no place in the image at which attention
            could be drawn.
    """
    if "image" not in model.encoders:
        raise ValueError(f"no attention maps: the model takes no images, only {', '.join(model.encoders) or 'text'}")
    if isinstance(model, AdoptedLM):
        raise ValueError("no attention maps: where an adopted model's tokens lie in the image is not known")
    encoder: Any = model.encoders["image"]
    rows, cols = encoder.grid
    visual_tokens = model.visual_tokens("image")
    if visual_tokens != rows * cols:
        raise ValueError(
            f"no attention maps: {type(model.connectors['image']).__name__} gives {visual_tokens} visual tokens, but "
            f"the encoder's grid has {rows} × {cols} places; maps need one token for each place"
        )
    return rows, cols


def attention_to_image(
    model: MultimodalLM, batch: Mapping[str, Any], layers: Sequence[int] | None = None
) -> AttentionMaps:
    """Attention from answers to images, and between questions and images.

    Args:
        model: in any mode and on any device; its attention backend does not matter.
        batch: what the processor makes of dialogues that hold their answers; one document in a row (not packed).
        layers: decoder layers to look at; all of them if not given.

    Raises:
        ValueError: visual tokens without a grid (see `visual_grid`), unknown layers, a packed batch, or a sample
            without image or answer.
    """
    grid = visual_grid(model)
    chosen = _chosen_layers(layers, model.config.text_config.num_hidden_layers)
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    tokens: TokenMap = inputs["tokens"]
    if int(tokens.document.max()) > 0:
        raise ValueError("attention maps take one document in a row; this batch is packed")
    rows = answer_rows(tokens)
    views = [_View(tokens, rows, sample) for sample in range(tokens.shape[0])]
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def record(layer: int, weights: Tensor) -> None:
        if layer in chosen:
            # Reduced at once: weights of all layers together would be L·H times as large as what is kept.
            found[layer] = [view.reduce(own.float().mean(dim=0)) for view, own in zip(views, weights, strict=True)]

    with evaluation_mode(model), torch.inference_mode():
        model(**inputs, return_logits=False, record=record)
    samples = []
    for sample in range(tokens.shape[0]):
        parts = zip(*(found[layer][sample] for layer in chosen), strict=True)
        to_image, question, image = (torch.stack(part).cpu() for part in parts)
        answer_ids = inputs["input_ids"][sample, 1:][rows[sample, :-1]].cpu()
        samples.append(SampleAttention(to_image, question, image, answer_ids))
    return AttentionMaps(chosen, grid, tuple(samples))


def attention_examples(
    model: MultimodalLM,
    processor: MultimodalProcessor,
    samples: Sequence[Sample],
    *,
    answers: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> list[AttentionExample]:
    """The attention of the last answer of each sample, over its last image.

    Args:
        model: see `attention_to_image`.
        processor: of that model.
        samples: dialogues that end with an answer.
        answers: what the model said, to be looked at in place of the answers in the samples.
        layers: decoder layers to look at; all of them if not given.

    Raises:
        ValueError: see `attention_to_image`; and samples that end with no answer, or another number of answers.
    """
    if answers is not None:
        samples = [_with_answer(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    encoded = [encode_sample(sample, processor.encoder) for sample in samples]
    batch = processor.collate(encoded)
    found = attention_to_image(model, batch, layers)
    rows, cols = found.grid
    tokens = batch["tokens"]
    assert isinstance(tokens, TokenMap)
    examples = []
    for row, (sample, attention) in enumerate(zip(samples, found.samples, strict=True)):
        turns = tokens.turn[row][tokens.is_answer[row]]
        special = torch.tensor(processor.tokenizer.all_special_ids)
        last = (turns == turns.max()) & ~torch.isin(attention.answer_ids, special)
        words = [processor.tokenizer.decode([token]) for token in attention.answer_ids[last].tolist()]
        maps = attention.to_image[:, last, -rows * cols :].unflatten(-1, (rows, cols))
        question = _last_question(sample)
        examples.append(AttentionExample(sample.key, sample.images[-1], question, tuple(words), found.layers, maps))
    return examples


class _View:
    """Which slots of one sample are what; reduces that sample's weights to the numbers that are kept."""

    def __init__(self, tokens: TokenMap, answer_rows: Tensor, sample: int) -> None:
        own = tokens.rows(sample)
        self.image = ((own.modality == Modality.IMAGE) & own.is_media)[0]
        self.answers = answer_rows[sample]
        if not bool(self.image.any()) or not bool(self.answers.any()):
            missing = "image" if not bool(self.image.any()) else "answer"
            raise ValueError(
                f"attention maps need an image and an answer in each sample; sample {sample} has no {missing}"
            )
        slot = torch.arange(len(own), device=own.device)
        turn = own.turn[0]
        first = int(slot[self.image].min())
        self.question = own.prompt_text[0] & (slot > first)
        self.media = own.is_media[0]
        # [S, S]: prompt text of the medium's own turn, behind the medium.
        asked = own.prompt_text[0][None, :] & (turn[None, :] == turn[:, None]) & (slot[None, :] > slot[:, None])
        self.asked = asked & self.media[:, None]
        self.media_asked = self.asked.any(dim=1)

    def reduce(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[S, S]` to answer→image `[T, V]`, question→image `[]` and image→question `[]`."""
        question_to_image = weights[self.question][:, self.image].sum(dim=1).mean()
        image_to_question = (weights * self.asked).sum(dim=1)[self.media_asked].mean()
        return weights[self.answers][:, self.image], question_to_image, image_to_question


def answer_rows(tokens: TokenMap) -> Tensor:
    """bool `[B, S]`: the tokens whose successor is an answer token of the same document."""
    rows = torch.zeros_like(tokens.is_answer)
    rows[:, :-1] = tokens.is_answer[:, 1:] & (tokens.document[:, 1:] == tokens.document[:, :-1])
    return rows


def _chosen_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if layers is None else tuple(layers)
    if not chosen or any(not 0 <= layer < count for layer in chosen):
        raise ValueError(f"layers must name some of 0..{count - 1}, got {list(chosen)}")
    return chosen


def _with_answer(sample: Sample, answer: str) -> Sample:
    if not sample.messages or sample.messages[-1]["role"] != "assistant":
        raise ValueError(f"{sample.key}: the sample ends with no answer")
    return replace(sample, messages=(*sample.messages[:-1], {**sample.messages[-1], "content": answer}))


def _last_question(sample: Sample) -> str:
    asked = [message for message in sample.messages or () if message["role"] == "user"]
    return without_placeholders(content_text(asked[-1]["content"], sample.key)) if asked else ""
