"""Pictures with names from packages: emoji of three artists, as questions and answers.

Google's and Twitter's artwork is trained on, Microsoft's is held out, and so are some concepts in every artwork. The
packages are read as `npm pack` leaves them and are not installed; nothing of them is part of mmfuse (Noto: Apache-2.0;
Twemoji: CC-BY-4.0; Fluent: MIT; names: MIT).

    npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d
    python -m mmfuse.data.emoji . pictures

writes `align.jsonl` (captions), `instruct.jsonl`, `val.jsonl` and `test.jsonl` with their images.

Question families: `name` and `yes_no` ask about trained concepts in the held-out artwork, `name_new` and `yes_no_new`
about concepts that were never shown. Half of the questions with the answer no name a concept of the same group.
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
TRAINED: Final = ("google", "twitter")
HELD_OUT: Final = "fluent"
_CATEGORIES: Final = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")


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


def write_pictures(packages: Path, folder: Path, *, concepts: int = 200, new: int = 25, seed: int = 0) -> None:
    """Write images and questions.

    Args:
        packages: folder of the packed packages.
        folder: is made.
        concepts: how many are used, the most regular names first.
        new: how many of them are never trained on.
        seed: of what is held out and asked.

    Raises:
        DataError: a package is missing, or lacks what was expected in it.
    """
    tars = {
        "google": _package(packages, "emoji-datasource-google"),
        "twitter": _package(packages, "emoji-datasource-twitter"),
        HELD_OUT: _package(packages, "lobehub-fluent-emoji-3d"),
    }
    places = {
        "google": "package/img/google/64/{}.png",
        "twitter": "package/img/twitter/64/{}.png",
        HELD_OUT: "package/assets/{}.webp",
    }
    rng = random.Random(seed)
    listed = _concepts(tars["google"])
    held: dict[str, dict[str, bytes]] = {
        artist: _members(path, {places[artist].format(concept.code): concept.code for concept in listed})
        for artist, path in tars.items()
    }
    usable = [concept for concept in listed if all(concept.code in found for found in held.values())]
    if len(usable) < concepts:
        raise DataError(f"{packages}: the packages have {len(usable)} concepts in common, {concepts} are asked for")
    chosen = rng.sample(usable, concepts)
    unseen, known = chosen[:new], chosen[new:]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for concept in chosen:
        for artist, found in held.items():
            _picture(found[concept.code]).save(folder / _file(concept, artist))
    _write(folder / "align.jsonl", [_caption(c, artist) for c in known for artist in TRAINED])
    taught = [chat for c in known for artist in TRAINED for chat in _questions(c, artist, known, rng, "")]
    _write(folder / "instruct.jsonl", taught)
    asked = [chat for c in known for chat in _questions(c, HELD_OUT, known, rng, "")]
    asked += [chat for c in unseen for chat in _questions(c, HELD_OUT, unseen, rng, "_new")]
    _write(folder / "test.jsonl", asked)
    _write(folder / "val.jsonl", rng.sample(asked[: 3 * len(known)], min(60, 3 * len(known))))


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
    except tarfile.TarError as error:
        raise DataError(f"{package}: cannot be read ({error})") from error
    if not found:
        raise DataError(f"{package}: it holds none of the expected files, such as {next(iter(wanted))}")
    return found


def _picture(data: bytes) -> Image.Image:
    """On white, small and square."""
    with Image.open(io.BytesIO(data)) as image:
        cut = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", cut.size, "white")
    return Image.alpha_composite(white, cut).convert("RGB")


def _file(concept: Concept, artist: str) -> str:
    return f"images/{concept.name}-{artist}.png"


def _caption(concept: Concept, artist: str) -> dict[str, Any]:
    chat = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": concept.name}]
    return {"messages": chat, "images": [_file(concept, artist)]}


def _questions(
    concept: Concept, artist: str, others: Sequence[Concept], rng: random.Random, suffix: str
) -> Iterable[dict[str, Any]]:
    """Its name, a question with the answer yes, and one with no."""
    alike = [other for other in others if other.group == concept.group and other != concept]
    rest = [other for other in others if other != concept]
    wrong = rng.choice(alike if alike and rng.random() < 0.5 else rest)
    for question, answer, family in (
        (NAME_QUESTION, concept.name, "name"),
        (f"Is this {concept.name}?", "yes", "yes_no"),
        (f"Is this {wrong.name}?", "no", "yes_no"),
    ):
        chat = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        yield {"messages": chat, "images": [_file(concept, artist)], "family": family + suffix}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures of the packages in a folder."""
    parser = argparse.ArgumentParser(description="Emoji of three artists with questions about them.")
    parser.add_argument("packages", type=Path, help="where `npm pack` put the packages")
    parser.add_argument("folder", type=Path, help="what is written")
    options = parser.parse_args(argv)
    write_pictures(options.packages, options.folder)


if __name__ == "__main__":
    main()
