"""Asks a model questions and collects its answers, with the media or blind."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from mmfuse.analysis.mode import evaluation_mode
from mmfuse.data.samples import Sample, encode_sample, split_answer
from mmfuse.eval.engine import closing_tokens, greedy_config
from mmfuse.eval.text import normalise
from mmfuse.models import EncodedSample, MultimodalLM, MultimodalProcessor
from mmfuse.models.chat import content_text, without_placeholders
from mmfuse.models.media import Features

#: `progress(answered, total)`, called after each batch.
Progress = Callable[[int, int], None]

#: The family of a question whose sample names none.
NO_FAMILY = "all"


@dataclass(frozen=True)
class Prediction:
    """A question, the answer that was expected, and the one that the model gave.

    Attributes:
        key: of the sample.
        family: of the question, `info["family"]` of the sample; `"all"` if it names none.
        question: the last text from the user, without placeholders.
        answer: the expected answer.
        prediction: the model's answer, without special tokens and outer whitespace.
        index: of the sample in the list that was asked about.
        finished: the model ended its answer itself; False if it was cut after `max_new_tokens`.
    """

    key: str
    family: str
    question: str
    answer: str
    prediction: str
    index: int
    finished: bool = True

    @property
    def right(self) -> bool:
        """Whether the model's answer equals the expected one after `normalise`."""
        return normalise(self.prediction) == normalise(self.answer)


def answer_questions(
    model: MultimodalLM,
    processor: MultimodalProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 256,
    max_new_tokens: int = 32,
    blind: bool = False,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Let the model answer the last question of each sample, greedily and without penalties.

    Prompts are batched by length, longest first, so that little is padding and a batch that does not fit fails at
    once. The model runs where it is, in evaluation mode, and every module gets its own mode back.

    Args:
        model: on any device.
        processor: of that model.
        samples: dialogues that end with the expected answer; earlier turns stay in the prompt.
        batch_size: questions that are answered together.
        max_new_tokens: after which an answer is cut.
        blind: replace each image by a plain one, see `plain_image`, and precomputed features by their mean over the
            medium's tokens. The prompt keeps its length and its tokens; what is still answered is known from the
            question, from how bright the image is, or from what the features say on average.
        progress: called after each batch.

    Returns:
        One prediction for each sample, in their order.

    Raises:
        ValueError: a sample without a question and its answer, or a size below 1.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    asked = [_ask(sample, processor, blind) for sample in samples]
    order = sorted(range(len(asked)), key=lambda number: -len(asked[number][1]))
    config = greedy_config(closing_tokens(model, processor), processor, max_new_tokens)
    predictions: dict[int, Prediction] = {}
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            answers = _generate(model, processor, [asked[row][1] for row in rows], config)
            for row, (text, finished) in zip(rows, answers, strict=True):
                predictions[row] = replace(asked[row][0], prediction=text, index=row, finished=finished)
            if progress is not None:
                progress(len(predictions), len(order))
    return [predictions[row] for row in range(len(order))]


def plain_image(image: Any) -> Any:
    """An image of the same size and kind in which every pixel is the image's mean, taken for each channel.

    Structure and position are gone, brightness and colour are not: with a black image instead, a model could tell
    that something is missing, and its score would also measure how it takes to inputs that it has never seen.

    Args:
        image: a PIL image, or a uint8 array `[H, W]` or `[H, W, C]`.
    """
    if isinstance(image, Image.Image):
        # The mean of palette indices is the index of some colour, not the mean colour.
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        return Image.fromarray(plain_image(np.asarray(image)))
    pixels = np.asarray(image)
    mean = np.rint(pixels.mean(axis=(0, 1), keepdims=True)).astype(pixels.dtype)
    return np.broadcast_to(mean, pixels.shape).copy()


def _without_content(sample: Sample, features: Container[str]) -> Sample:
    """The sample with every medium made plain; those of the modalities in `features` come as features."""
    plain: dict[str, tuple[Any, ...]] = {}
    for name, items in sample.media.items():
        if name in features:
            given = (item if isinstance(item, Features) else Features.of(item, sample.key) for item in items)
            plain[name] = tuple(item.plain() for item in given)
        else:
            plain[name] = tuple(plain_image(item) for item in items)
    return replace(sample, images=plain["image"], audio=plain["audio"], eeg=plain["eeg"])


def _ask(sample: Sample, processor: MultimodalProcessor, blind: bool) -> tuple[Prediction, EncodedSample]:
    """The question without a prediction yet, and its prompt."""
    prompt, answer = split_answer(sample)
    messages = prompt.messages
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{sample.key}: the last answer follows no question of the user")
    question = without_placeholders(content_text(messages[-1]["content"], sample.key))
    families = sample.info.get("family") or [NO_FAMILY]
    family = families if isinstance(families, str) else families[-1]
    if blind:
        prompt = _without_content(prompt, processor.feature_shapes)
    encoded = encode_sample(prompt, processor.encoder, generation=True)
    return Prediction(sample.key, str(family), question, answer.strip(), "", -1), encoded


def _generate(
    model: MultimodalLM, processor: MultimodalProcessor, prompts: list[EncodedSample], config: GenerationConfig
) -> list[tuple[str, bool]]:
    """For each prompt the answer and whether the model ended it."""
    collated = processor.collate(prompts, side="left", supervised=False)
    batch: dict[str, Any] = {name: value.to(model.device) for name, value in collated.items()}
    length = batch["input_ids"].shape[1]
    made = model.generate(**batch, generation_config=config)[:, length:].cpu()
    texts = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
    ends = torch.tensor(config.eos_token_id or [], dtype=made.dtype)
    finished = torch.isin(made, ends).any(dim=1).tolist()
    return [(text.strip(), done) for text, done in zip(texts, finished, strict=True)]
