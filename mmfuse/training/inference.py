"""Answers from a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from mmfuse.data.sources.features import FEATURE_FORMATS, decode_features
from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM, MultimodalProcessor
from mmfuse.models.build import load_processor
from mmfuse.models.media import MEDIA, Features


def load_model(folder: Path) -> tuple[MultimodalLM, MultimodalProcessor]:
    """A model in evaluation mode, on a GPU if there is one, and its processor.

    Args:
        folder: a saved model, or an adapter with the config of its run in the same folder or the one above.

    Raises:
        ConfigError: an adapter that does not fit its model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    if (folder / "adapter_config.json").is_file():
        from mmfuse.training.export import CONFIG, tuned_module

        config = folder / CONFIG if (folder / CONFIG).is_file() else folder.parent / CONFIG
        module = tuned_module(folder, config)
        if module.adapter is not None and module.adapter.base_dtype != "float32":
            module.float()  # outside of training nothing casts between the base and what was trained
        module.to(device)
        return module.network, module.processor
    model: MultimodalLM = MultimodalLM.from_pretrained(folder)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), load_processor(model, folder)


def answer(
    model: MultimodalLM,
    processor: MultimodalProcessor,
    prompt: str,
    images: Sequence[Path] = (),
    audio: Sequence[Path] = (),
    eeg: Sequence[Path] = (),
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
) -> str:
    """Answer one prompt.

    Args:
        model: see `load_model`.
        processor: of that model.
        prompt: the question; without an `<image>` of its own, the images stand before it, and likewise `<audio>` and
            `<eeg>`.
        images: image files, in reading order; of features for a model that takes images as such.
        audio: files of features, in reading order.
        eeg: files of features, in reading order.
        max_new_tokens: after which the answer is cut.
        num_beams: 1 is greedy.

    Raises:
        ConfigError: an image that cannot be read, another number of marks than media, or media that the model does not
            take.
        DataError: features that cannot be read.
    """
    files = {"image": images, "audio": audio, "eeg": eeg}
    marks = "".join(
        f"{MEDIA[name].placeholder}\n" * len(paths)
        for name, paths in files.items()
        if MEDIA[name].placeholder not in prompt
    )
    messages = [{"role": "user", "content": marks + prompt}]
    pictures = [open_features(path) if _holds_features(path) else open_image(path) for path in images]
    heard, recorded = ([open_features(path) for path in paths] for paths in (audio, eeg))
    try:
        batch = processor(messages, pictures, heard, recorded, generation=True)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--prompt: {error}") from error
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
    text = processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


def open_features(path: Path) -> Features:
    """Read a file of features.

    Raises:
        ConfigError: the file's name has another ending than files of features have.
        DataError: it cannot be read, see `decode_features`.
    """
    if not _holds_features(path):
        raise ConfigError(f"{path}: expected features, in a file .{' or .'.join(FEATURE_FORMATS)}")
    return decode_features(path.read_bytes(), path.suffix.lower()[1:], str(path))


def _holds_features(path: Path) -> bool:
    return path.suffix.lower()[1:] in FEATURE_FORMATS


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
