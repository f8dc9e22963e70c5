"""The handwriting tasks of the embedded suite: real scans that no training split of the demo holds, asked in five ways.

The scenes are new ones from the test scans, so a model that was trained on the demo has seen none of their digits. The
questions are those of the demo, word for word, but for the options.

Shapes: 2 × 2 digits in a scene.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mmfuse.data.handwriting import Scenes, load_scans, make_scenes
from mmfuse.data.handwriting_questions import READ_ALL, candidates, transcription
from mmfuse.data.handwriting_shards import encode_png
from mmfuse.eval.tasks.items import Item, MediaFile, Request, Task, ask

#: How often each kind of question is asked; together about a minute for a small model on two cores.
POPE_SCENES: Final = 40
CHOICES: Final = 120
COUNTS: Final = 120
CAPTIONS: Final = 100
RETRIEVALS: Final = 40
#: Captions among which the right one is to be found.
GALLERY: Final = 10

_LETTERS: Final = "ABCD"
#: Drawn apart from the demo's own test questions, which come from `[seed, part]` with a part below 4.
_STREAM: Final = 1_000


def handwriting_tasks() -> dict[str, Callable[[], Task]]:
    """The tasks by name."""
    return {
        "handwriting_pope": pope,
        "handwriting_choice": choice,
        "handwriting_count": count,
        "handwriting_caption": caption,
        "handwriting_retrieval": retrieval,
    }


def pope() -> Task:
    """Is there a digit? As POPE asks for objects: half are there, and the others are chosen in three ways.

    `random`: any absent digit. `popular`: the absent digit that is most frequent in all scenes. `adversarial`: the
    absent digit whose mean scan is closest to that of a digit that is there.
    """
    scenes, rng = _scenes(POPE_SCENES, 0)
    digits = scenes.digits.reshape(len(scenes), -1)
    frequent = np.argsort(-np.bincount(digits.ravel(), minlength=10), kind="stable")
    alike = _alike()
    items = []
    for number, row in enumerate(digits):
        present = sorted(set(row.tolist()))
        absent = [digit for digit in range(10) if digit not in present]
        media = (_picture(scenes, number),)
        negatives = {
            "random": rng.choice(absent, size=2, replace=False).tolist(),
            "popular": [digit for digit in frequent.tolist() if digit in absent][:2],
            "adversarial": sorted(absent, key=lambda digit: min(alike[digit, other] for other in present))[:2],
        }
        for split, wrong in negatives.items():
            right = rng.choice(present, size=2, replace=len(present) < 2).tolist()
            for turn, (digit, answer) in enumerate([(right[0], "yes"), (wrong[0], "no"),
                                                    (right[1], "yes"), (wrong[1], "no")]):  # fmt: skip
                items.append(
                    Item(
                        id=f"{split}-{number:03d}-{turn}",
                        messages=ask(f"Is there a {digit}?", media),
                        media=media,
                        target=answer,
                        category=split,
                        cluster=f"scene-{number:03d}",
                    )
                )
    order = {"random": 0, "popular": 1, "adversarial": 2}
    items.sort(key=lambda item: order[item.category])
    return Task("handwriting_pope", "pope", "official", tuple(items), max_new_tokens=4, about="Is there a 7? yes or no")


def choice() -> Task:
    """Which digit stands in a cell? The likelihoods of four digits are compared, those of the scene among them."""
    scenes, rng = _scenes(CHOICES, 1)
    items = []
    for number, grid in enumerate(scenes.digits.tolist()):
        cells = candidates("position", grid)
        question, right = cells[int(rng.integers(len(cells)))]
        others = sorted({str(digit) for row in grid for digit in row} - {right})
        rest = [str(digit) for digit in rng.permutation(10) if str(digit) != right and str(digit) not in others]
        options = rng.permutation([right, *(others + rest)[:3]]).tolist()
        media = (_picture(scenes, number),)
        items.append(
            Item(
                id=f"choice-{number:03d}",
                messages=ask(question, media),
                media=media,
                target=_LETTERS[options.index(right)],
                options=tuple(options),
                labels=tuple(_LETTERS),
                fields={"choices": options},
                category=f"{question.removeprefix('What is in ').removesuffix('?')}",
            )
        )
    about = "the digit in a cell, by the likelihood of four options"
    return Task("handwriting_choice", "multiple_choice", "letter", tuple(items), Request.RANK, about=about)


def count() -> Task:
    """How many times is a digit written? Numbers from 0 to 4, those above 0 as often as a scene allows."""
    scenes, rng = _scenes(COUNTS, 2)
    items = []
    for number, grid in enumerate(scenes.digits.tolist()):
        options = candidates("count", grid)
        some = [option for option in options if option[1] != "0"] if number % 4 else options
        question, answer = some[int(rng.integers(len(some)))]
        media = (_picture(scenes, number),)
        items.append(Item(f"count-{number:03d}", ask(question, media), media, answer, category=answer))
    return Task("handwriting_count", "exact_match", "official", tuple(items), max_new_tokens=4, about="how many times")


def caption() -> Task:
    """Read all digits: the caption of a scene, in the model's own words."""
    scenes, _ = _scenes(CAPTIONS, 3)
    items = []
    for number, grid in enumerate(scenes.digits.tolist()):
        media = (_picture(scenes, number),)
        text = transcription(grid)
        items.append(Item(f"caption-{number:03d}", ask(READ_ALL, media), media, text))
    about = "read all digits"
    return Task("handwriting_caption", "exact_match", "official", tuple(items), max_new_tokens=12, about=about)


def retrieval() -> Task:
    """Which of ten captions is that of the scene? By likelihood; four wrong ones differ in a single digit."""
    scenes, rng = _scenes(RETRIEVALS, 4)
    texts = [transcription(grid) for grid in scenes.digits.tolist()]
    items = []
    for number, text in enumerate(texts):
        near: list[str] = []
        while len(near) < 4:
            place = int(rng.choice([at for at, character in enumerate(text) if character.isdigit()]))
            changed = f"{text[:place]}{rng.integers(10)}{text[place + 1 :]}"
            near += [changed] if changed != text and changed not in near else []
        far = [other for other in dict.fromkeys(texts) if other != text and other not in near]
        wrong = near + rng.choice(far, size=GALLERY - 1 - len(near), replace=False).tolist()
        options = rng.permutation([text, *wrong]).tolist()
        media = (_picture(scenes, number),)
        items.append(
            Item(
                id=f"retrieval-{number:03d}",
                messages=ask(READ_ALL, media),
                media=media,
                target=str(options.index(text)),
                options=tuple(options),
                labels=tuple(map(str, range(GALLERY))),
            )
        )
    about = f"the caption of a scene among {GALLERY}, by likelihood"
    return Task("handwriting_retrieval", "exact_match", "official", tuple(items), Request.RANK, about=about)


def _scenes(count: int, stream: int) -> tuple[Scenes, np.random.Generator]:
    """New scenes of test scans, and the generator that goes on behind them."""
    rng = np.random.default_rng([_STREAM, stream])
    return make_scenes(load_scans()["test"], count, rng), rng


@lru_cache(maxsize=1)
def _alike() -> NDArray[np.float64]:
    """`[10, 10]`: how far the mean scans of two digits are apart, from the training scans."""
    scans = load_scans()["train"]
    means = np.stack([scans.pixels[scans.labels == digit].mean(axis=0).ravel() for digit in range(10)])
    apart: NDArray[np.float64] = np.linalg.norm(means[:, None] - means[None], axis=-1)
    return apart


def _picture(scenes: Scenes, number: int) -> MediaFile:
    data = encode_png(scenes.pixels[number])
    return MediaFile("image", f"scene {number}", io.BytesIO(data).getvalue, "png")
