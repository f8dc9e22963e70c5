"""Vision-language models of every architecture that can be adopted, as users have them: saved to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mmfuse.testing.vlms import VLMS, tiny_vlm

QUESTIONS = ("what is in this picture ?", "a cat or a dog ?", "left of the red mat ?")


class Vlm:
    """An architecture: its folder, the model and the processor that were saved there."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.model: PreTrainedModel
        self.processor: ProcessorMixin
        self.model, self.processor = tiny_vlm(family)
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def batch(self, images: tuple[int, ...] = (1,), side: str = "left", **kwargs: Any) -> dict[str, Any]:
        """What the processor makes of one question a sample, about so many `images` each."""
        rng = np.random.default_rng(0)
        sizes = [(20, 24), (31, 17), (16, 40)]
        pictures, texts = [], []
        for sample, count in enumerate(images):
            shapes = [sizes[(sample + n) % 3] for n in range(count)]
            pictures.append([Image.fromarray(rng.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in shapes])
            words = {"type": "text", "text": QUESTIONS[sample % 3]}
            chat = [{"role": "user", "content": [*[{"type": "image"}] * count, words]}]
            texts.append(self.processor.apply_chat_template(chat, add_generation_prompt=True))
        given = pictures if sum(images) else None
        batch = self.processor(images=given, text=texts, padding=True, padding_side=side, return_tensors="pt", **kwargs)
        return dict(batch)

    def text_only(self) -> dict[str, Any]:
        """Two samples without an image, which some processors do not take: what their tokenizer makes of them."""
        typed = "token_type_ids" in self.batch((1,))
        words = ["a cat and a dog", "red mat"]
        tokenizer = self.processor.tokenizer
        return dict(tokenizer(words, padding=True, return_tensors="pt", return_token_type_ids=typed))


@pytest.fixture(scope="session", params=VLMS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM spells numbers")
    return Vlm(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    return Vlm("paligemma", tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    return Vlm("llava", tmp_path_factory.mktemp("llava"))
