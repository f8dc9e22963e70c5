"""The picture tasks of the embedded suite: photographs and drawings that installed packages ship, annotated by hand.

Two photographs of scikit-learn (CC BY 2.0), and of matplotlib's sample data a portrait in the public domain, a drawing
of a gift and matplotlib's logo. Five pictures are no benchmark: they show whether a vision-language model sees at all,
and whether an evaluation runs from end to end. A model trained on handwriting alone answers by chance.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import numpy as np
from PIL import Image

from mmfuse.errors import DataError
from mmfuse.eval.tasks.items import Item, MediaFile, Task, ask


@dataclass(frozen=True)
class _Picture:
    """A picture and what is on it.

    Attributes:
        name: of the picture.
        package: that ships it.
        path: inside the package.
        there: what can be seen on it.
        likely: what is not there, and often is beside what is.
        questions: with four options each, the right one first.
    """

    name: str
    package: str
    path: str
    there: tuple[str, ...]
    likely: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, str, str, str]], ...]


_PICTURES: Final = (
    _Picture(
        "china",
        "sklearn",
        "datasets/images/china.jpg",
        ("a pagoda", "a roof", "a tree", "the sky"),
        ("a horse", "a car", "snow"),
        (
            ("What kind of building is this?", ("a pagoda", "a lighthouse", "a castle", "a windmill")),
            ("What is behind the building?", ("a lake", "a desert", "a city street", "a stadium")),
        ),
    ),
    _Picture(
        "flower",
        "sklearn",
        "datasets/images/flower.jpg",
        ("a flower", "a leaf", "a petal"),
        ("a bee", "a vase", "a butterfly"),
        (
            ("What colour is the flower?", ("orange", "blue", "white", "purple")),
            ("What is in front of the leaves?", ("a flower", "a bird", "a fence", "a bottle")),
        ),
    ),
    _Picture(
        "portrait",
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        ("a woman", "a hat", "a flag", "a uniform"),
        ("a microphone", "a ship", "a computer"),
        (
            ("What does the person wear on the head?", ("a cap", "a crown", "a helmet", "nothing")),
            ("What is behind the person?", ("a flag", "a bookshelf", "a window", "a mountain")),
        ),
    ),
    _Picture(
        "gift",
        "matplotlib",
        "mpl-data/sample_data/Minduka_Present_Blue_Pack.png",
        ("a box", "a ribbon", "a bow"),
        ("a cake", "a candle", "a balloon"),
        (
            ("What colour is the box?", ("blue", "red", "green", "yellow")),
            ("What is on top of the box?", ("a bow", "a cat", "a book", "a hat")),
        ),
    ),
    _Picture(
        "logo",
        "matplotlib",
        "mpl-data/sample_data/logo2.png",
        ("a word", "a letter", "a circle"),
        ("a star", "a face", "a map"),
        (
            ("Which word is written here?", ("matplotlib", "tensorflow", "notebook", "microsoft")),
            ("What stands in place of one letter?", ("a round chart", "a heart", "a key", "an eye")),
        ),
    ),
)
#: What is on none of the pictures.
_NOWHERE: Final = ("a dog", "a bicycle", "a pizza", "a train", "an umbrella", "a guitar", "a clock", "a banana")
_LETTERS: Final = "ABCD"


def picture_tasks() -> dict[str, Callable[[], Task]]:
    """The tasks by name."""
    return {"pictures_pope": pope, "pictures_choice": choice}


def pope() -> Task:
    """Is there a thing in the image? Half are there; of the others `adversarial` are those that one would expect."""
    rng = np.random.default_rng(0)
    # As often as things are on pictures of this set, but not on this one.
    everywhere = sorted({thing for picture in _PICTURES for thing in picture.there})
    items = []
    for picture in _PICTURES:
        absent = {
            "random": rng.permutation(_NOWHERE).tolist(),
            "popular": [thing for thing in rng.permutation(everywhere).tolist() if _unlike(thing, picture.there)],
            "adversarial": list(picture.likely),
        }
        for split, things in absent.items():
            for turn, (there, wrong) in enumerate(zip(picture.there[:3], things[:3], strict=True)):
                items += [
                    _pope_item(picture, split, f"{2 * turn}", there, "yes"),
                    _pope_item(picture, split, f"{2 * turn + 1}", wrong, "no"),
                ]
    order = ("random", "popular", "adversarial")
    items.sort(key=lambda item: order.index(item.category))
    about = "is there a thing in the image"
    return Task("pictures_pope", "pope", "official", tuple(items), max_new_tokens=8, about=about)


def choice() -> Task:
    """Questions with four options, answered with a letter; each is asked once with each place of the right one."""
    items = []
    for picture in _PICTURES:
        for number, (question, options) in enumerate(picture.questions):
            for shift in range(len(options)):
                turned = options[shift:] + options[:shift]
                listed = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, turned, strict=True))
                media = (_file(picture),)
                items.append(
                    Item(
                        id=f"{picture.name}-{number}-{shift}",
                        messages=ask(
                            f"{question}\n{listed}\nAnswer with the option's letter from the given choices directly.",
                            media,
                        ),
                        media=media,
                        target=_LETTERS[turned.index(options[0])],
                        fields={"choices": list(turned)},
                        category=picture.name,
                        cluster=f"{picture.name}-{number}",
                    )
                )
    return Task("pictures_choice", "multiple_choice", "letter", tuple(items), about="answers with a letter")


def _pope_item(picture: _Picture, split: str, turn: str, thing: str, answer: str) -> Item:
    media = (_file(picture),)
    return Item(
        id=f"{split}-{picture.name}-{turn}",
        messages=ask(f"Is there {thing} in the image?", media),
        media=media,
        target=answer,
        category=split,
        cluster=picture.name,
    )


def _unlike(thing: str, there: Sequence[str]) -> bool:
    """Whether a thing of another picture cannot be meant by what is on this one."""
    general = {"a circle", "a letter", "a word", "a petal", "a leaf", "a box", "the sky", "a bow", "a roof", "a tree"}
    return thing not in there and thing not in general


def _file(picture: _Picture) -> MediaFile:
    def read() -> bytes:
        place = files(picture.package).joinpath(picture.path)
        try:
            data = place.read_bytes()
        except OSError as error:
            raise DataError(f"{picture.package} ships no {picture.path} here ({error})") from error
        return data if picture.path.endswith(".jpg") else _on_white(data)

    ending = "jpg" if picture.path.endswith(".jpg") else "ppm"
    return MediaFile("image", f"{picture.package}/{picture.path}", read, ending)


def _on_white(data: bytes) -> bytes:
    """A picture with transparency on white paper, as PPM: raw pixels, the same bytes whatever zlib is installed."""
    with Image.open(io.BytesIO(data)) as image:
        upper = image.convert("RGBA")
    paper = Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    out = io.BytesIO()
    paper.save(out, format="PPM")
    return out.getvalue()
