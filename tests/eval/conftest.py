"""A tiny model that can be asked, and tasks that it answers in a second."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.eval.engine import NetworkEngine
from mmfuse.eval.tasks.items import Item, MediaFile, Request, Task, ask
from mmfuse.models.build import processor_for
from mmfuse.testing import tiny_model

MakeEngine = Callable[..., NetworkEngine]


@pytest.fixture(scope="session")
def make_engine() -> MakeEngine:
    """`make_engine("mma")` gives a tiny random model under that strategy."""
    tokenizer = load_tokenizer()
    made: dict[str, NetworkEngine] = {}

    def make(fusion: str = "causal") -> NetworkEngine:
        if fusion not in made:
            model = tiny_model(fusion, vocab_size=len(tokenizer), max_position_embeddings=512)
            made[fusion] = NetworkEngine(model, processor_for(model, tokenizer))
        return made[fusion]

    return make


@pytest.fixture(scope="session")
def engine(make_engine: MakeEngine) -> NetworkEngine:
    return make_engine("mma")


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """`png(seed)` gives a picture of noise, 16 × 16."""

    def draw(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG")
        return out.getvalue()

    return draw


@pytest.fixture(scope="session")
def small_task(png: Callable[[int], bytes]) -> Callable[..., Task]:
    """`small_task(count, request, name)`: questions of different lengths about pictures of noise."""

    def make(count: int = 12, request: Request = Request.GENERATE, name: str = "small") -> Task:
        items = []
        for number in range(count):
            media = (MediaFile("image", f"noise-{number}.png", partial(png, number), "png"),)
            text = "Is there a " + " ".join(str(digit) for digit in range(1 + number % 5)) + "?"
            options = ("3", "35 71", "yes") if request is Request.RANK else ()
            items.append(Item(f"q{number}", ask(text, media), media, "yes", options=options, category=f"c{number % 2}"))
        return Task(name, "exact_match", "official", tuple(items), request, max_new_tokens=5)

    return make


@pytest.fixture(scope="session")
def decoded() -> Callable[[Sequence[Item]], list[list[Any]]]:
    """`decoded(items)` gives the media of each."""
    return lambda items: [[file.decode(file.read()) for file in item.media] for item in items]
