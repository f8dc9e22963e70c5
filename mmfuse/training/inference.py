"""Answers from a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from mmfuse.data.decoders import DEFAULT_BUDGET, FEATURE_FORMATS, PICTURE, Budget
from mmfuse.data.sources.files import read_whole
from mmfuse.data.sources.undecoded import Undecoded
from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM, MultimodalProcessor
from mmfuse.models.build import load_processor
from mmfuse.models.media import MEDIA


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
        ConfigError: another number of marks than media, or media that the model does not take.
        DataError: a file that cannot be read.
    """
    files = {"image": images, "audio": audio, "eeg": eeg}
    marks = "".join(
        f"{MEDIA[name].placeholder}\n" * len(paths)
        for name, paths in files.items()
        if MEDIA[name].placeholder not in prompt
    )
    messages = [{"role": "user", "content": marks + prompt}]
    pictures, heard, recorded = ([open_medium(name, path) for path in paths] for name, paths in files.items())
    try:
        batch = processor(messages, pictures, heard, recorded, generation=True)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--prompt: {error}") from error
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
    text = processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


def open_medium(modality: str, path: Path, budget: Budget = DEFAULT_BUDGET) -> Any:
    """Read a file as training does: features, or for the modality `image` also a picture.

    Raises:
        ConfigError: a modality that is taken as features, and a file of another kind.
        DataError: the file is damaged, or larger than the budget allows.
    """
    ending = path.suffix.lower()[1:]
    if ending not in FEATURE_FORMATS:
        if modality != "image":
            raise ConfigError(f"{path}: expected features, in a file .{' or .'.join(FEATURE_FORMATS)}")
        ending = PICTURE
    return Undecoded(lambda: read_whole(path, modality, "the prompt", budget), ending, str(path), budget).decode()
