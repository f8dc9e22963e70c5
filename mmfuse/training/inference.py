"""Answers from a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM, MultimodalProcessor
from mmfuse.models.chat import IMAGE_TOKEN


def load_model(folder: Path) -> tuple[MultimodalLM, MultimodalProcessor]:
    """A model in evaluation mode, on a GPU if there is one, and its processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    model: MultimodalLM = MultimodalLM.from_pretrained(folder)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), MultimodalProcessor.from_pretrained(folder)


def answer(
    model: MultimodalLM,
    processor: MultimodalProcessor,
    prompt: str,
    images: Sequence[Path] = (),
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
) -> str:
    """Answer one prompt.

    Args:
        model: see `load_model`.
        processor: of that model.
        prompt: the question; without an `<image>` of its own, the images stand before it.
        images: image files, in reading order.
        max_new_tokens: after which the answer is cut.
        num_beams: 1 is greedy.

    Raises:
        ConfigError: an image that cannot be read, or another number of `<image>` marks than images.
    """
    marks = "" if IMAGE_TOKEN in prompt else (IMAGE_TOKEN + "\n") * len(images)
    messages = [{"role": "user", "content": marks + prompt}]
    pictures = [open_image(path) for path in images]
    try:
        batch = processor(messages, pictures, generation=True)
    except ValueError as error:
        raise ConfigError(f"--prompt: {error}") from error
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
    text = processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


def open_image(path: Path) -> Image.Image:
    """Read an image file whole.

    Raises:
        ConfigError: the file is no image, or is cut off.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error})") from error
