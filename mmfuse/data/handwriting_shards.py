"""The handwriting demo as webdataset shards in a cache folder: written once, checked on every use.

A shard is a tar of `{key}.0.png` and `{key}.json`, the format in which users bring their own data. The bytes depend on
the arguments alone: members have a fixed order, time and owner, and the PNGs hold stored (not compressed) rows, so that
another zlib gives the same file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mmfuse.data.handwriting import LICENCE, SOURCE, SPLITS, Scans, Scenes, load_scans, make_scenes
from mmfuse.data.handwriting_questions import FAMILIES, Balancer, Question, candidates, transcription
from mmfuse.errors import unknown

MANIFEST: Final = "manifest.json"
FORMAT: Final = "mmfuse-handwriting-1"

Sample = dict[str, Any]

# A scene of one repeated digit has no digit that these could be asked about.
_NOT_ALWAYS: Final = frozenset({"right_of", "above"})


@dataclass(frozen=True)
class Handwriting:
    """What to write: the arguments on which every byte depends.

    Attributes:
        rows, cols: size of a scene in digits.
        align: captions for alignment (`{"text": "<image>35 71"}`), from training scans.
        instruct: dialogues for instruction tuning, from training scans.
        turns: questions in a dialogue.
        val, test: scenes with one question each, from the scans of these splits, unchanged by `shift` and `gain`.
        families: question families; each gets an equal share of val and test.
        weights: how likely a family is asked in a dialogue of `instruct`, against 1 for one that is not named. Those
            that are learned slowly can be asked more often; val and test stay even.
        shift, gain: variety of the training scans, see `make_scenes`.
        seed: seed of everything drawn.
        per_shard: samples in a shard.
    """

    rows: int = 2
    cols: int = 2
    align: int = 8192
    instruct: int = 16384
    turns: int = 6
    val: int = 1050
    test: int = 2100
    families: tuple[str, ...] = tuple(FAMILIES)
    weights: dict[str, float] = field(default_factory=dict)
    shift: float = 0.0
    gain: float = 0.0
    seed: int = 0
    per_shard: int = 4096

    def __post_init__(self) -> None:
        for name in ("align", "instruct", "turns", "val", "test", "per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(unknown("question family", family, FAMILIES))
        if not self.families or len(set(self.families)) != len(self.families):
            raise ValueError(f"families must name each family once, got {self.families}")
        if not set(self.families) - _NOT_ALWAYS:
            raise ValueError(
                f"families {self.families} have no question about some scenes; add another, such as 'read'"
            )
        for family, weight in self.weights.items():
            if family not in self.families:
                raise ValueError(unknown("question family in weights", family, self.families))
            if not 0 < weight < math.inf:
                raise ValueError(f"weights must be above 0, got {weight} for {family!r}")
        if ("right_of" in self.families and self.cols < 2) or ("above" in self.families and self.rows < 2):
            raise ValueError(f"right_of and above need two columns and two rows, got {self.rows} x {self.cols}")

    def arguments(self) -> dict[str, Any]:
        """Return the fields as JSON would give them back."""
        return dict(json.loads(json.dumps(asdict(self))))

    def fingerprint(self) -> str:
        """Return 12 hexadecimal digits that name this data set, for use in a folder name."""
        text = json.dumps([FORMAT, self.arguments()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def samples(spec: Handwriting, part: str) -> Iterator[Sample]:
    """Yield the samples of `part`: `"align"`, `"instruct"`, `"val"` or `"test"`.

    Each is a dict with `key`, `images` (a list with one uint8 array `[8 R, 8 C]`), `digits` and `scans` (lists
    `[R][C]`: labels and scan identities), and either `text` (alignment) or `messages`, with `family` and `targets`, one
    entry per answer.

    Raises:
        ValueError: there is no such part.
    """
    parts = ("align", "instruct", "val", "test")
    if part not in parts:
        raise ValueError(unknown("part of the handwriting data", part, parts))
    rng = np.random.default_rng([spec.seed, parts.index(part)])
    scans = load_scans()[part if part in SPLITS else "train"]
    if part == "align":
        yield from _captions(_training_scenes(scans, spec.align, spec, rng))
    elif part == "instruct":
        yield from _dialogues(_training_scenes(scans, spec.instruct, spec, rng), spec, rng)
    else:
        yield from _single_questions(part, scans, spec, rng)


def write_shards(folder: str | Path, spec: Handwriting) -> dict[str, Any]:
    """Write the shards of `spec` into `folder`, or keep what is there if it is just that, and return the manifest.

    The folder appears whole or not at all (temporary folder, then rename), also when several processes write it at
    once.

    Raises:
        FileExistsError: `folder` holds something else than such shards, which would be lost.
    """
    folder = Path(folder)
    found = read_manifest(folder, spec)
    if found is not None:
        return found
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new = scratch / "new"
        new.mkdir()
        manifest = _write_all(new, spec)
        # Another process may have been faster, and a run may be reading its shards already: those must stay.
        found = read_manifest(folder, spec)
        if found is not None:
            return found
        try:
            _swap(new, folder, scratch / "old")
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            found = read_manifest(folder, spec)
            if found is None:
                raise
            return found
        return manifest
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_manifest(folder: str | Path, spec: Handwriting) -> dict[str, Any] | None:
    """Return the manifest in `folder` if it describes `spec` and every shard has its checksum, else None."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["arguments"] != spec.arguments():
            return None
        for part in manifest["parts"].values():
            for shard in part["shards"]:
                if _sha256((folder / shard["name"]).read_bytes()) != shard["sha256"]:
                    return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(manifest)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an 8-bit greyscale PNG of `[H, W]`, its rows stored without compression."""
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _training_scenes(scans: Scans, count: int, spec: Handwriting, rng: np.random.Generator) -> Scenes:
    return make_scenes(scans, count, rng, rows=spec.rows, cols=spec.cols, shift=spec.shift, gain=spec.gain)


def _sample(part: str, number: int, scenes: Scenes, scene: int, rest: Sample) -> Sample:
    return {
        "key": f"{part}-{number:06d}",
        "images": [scenes.pixels[scene]],
        **rest,
        "digits": scenes.digits[scene].tolist(),
        "scans": scenes.scans[scene].tolist(),
    }


def _captions(scenes: Scenes) -> Iterator[Sample]:
    for number, grid in enumerate(scenes.digits.tolist()):
        yield _sample("align", number, scenes, number, {"text": f"<image>{transcription(grid)}"})


def _dialogues(scenes: Scenes, spec: Handwriting, rng: np.random.Generator) -> Iterator[Sample]:
    balancer = Balancer(rng)
    for number, grid in enumerate(scenes.digits.tolist()):
        questions = balancer.dialogue(grid, spec.turns, spec.families, spec.weights)
        yield _sample("instruct", number, scenes, number, _chat(questions))


def _single_questions(part: str, scans: Scans, spec: Handwriting, rng: np.random.Generator) -> Iterator[Sample]:
    """One question per scene. A scene goes to the family that has fewest questions among those that it allows."""
    wanted = spec.val if part == "val" else spec.test
    scenes = make_scenes(scans, wanted, rng, rows=spec.rows, cols=spec.cols)
    balancer, held = Balancer(rng), Counter[str]()
    for number, grid in enumerate(scenes.digits.tolist()):
        able = {family: options for family in spec.families if (options := candidates(family, grid))}
        family = min(able, key=lambda name: held[name])
        held[family] += 1
        yield _sample(part, number, scenes, number, _chat([balancer.pick(family, able[family])]))


def _chat(questions: Iterable[Question]) -> Sample:
    messages: list[dict[str, str]] = []
    questions = list(questions)
    for number, question in enumerate(questions):
        prefix = "" if number else "<image>\n"
        messages.append({"role": "user", "content": prefix + question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return {
        "messages": messages,
        "family": [question.family for question in questions],
        "targets": [question.answer for question in questions],
    }


def _write_all(folder: Path, spec: Handwriting) -> dict[str, Any]:
    parts = {part: _write_part(folder, spec, part) for part in ("align", "instruct", "val", "test")}
    manifest = {
        "format": FORMAT,
        "source": SOURCE,
        "licence": LICENCE,
        "split": "by scan, stratified by digit; the source has no writer ids",
        "scans": {split: len(scans) for split, scans in load_scans().items()},
        "arguments": spec.arguments(),
        "parts": parts,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _write_part(folder: Path, spec: Handwriting, part: str) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    batch: list[Sample] = []
    answers: dict[str, Counter[str]] = {}

    def flush() -> None:
        data = _tar(batch)
        name = f"{part}-{len(shards):04d}.tar"
        (folder / name).write_bytes(data)
        shards.append({"name": name, "samples": len(batch), "bytes": len(data), "sha256": _sha256(data)})
        batch.clear()

    for sample in samples(spec, part):
        for family, target in zip(sample.get("family", ()), sample.get("targets", ()), strict=True):
            answers.setdefault(family, Counter())[target] += 1
        batch.append(sample)
        if len(batch) == spec.per_shard:
            flush()
    if batch:
        flush()
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "families": {family: _majority(answers[family]) for family in spec.families if family in answers},
        "shards": shards,
    }


def _majority(answers: Counter[str]) -> dict[str, Any]:
    """How many questions, the answer given most often, and the accuracy of always giving it."""
    total = answers.total()
    answer, times = min(answers.items(), key=lambda item: (-item[1], item[0]))
    return {"questions": total, "majority_answer": answer, "majority_accuracy": round(times / total, 4)}


def _tar(batch: list[Sample]) -> bytes:
    blocks: list[bytes] = []
    for sample in batch:
        record = {name: value for name, value in sample.items() if name not in ("key", "images")}
        members = [(f"{number}.png", encode_png(image)) for number, image in enumerate(sample["images"])]
        members.append(("json", json.dumps(record, separators=(",", ":")).encode()))
        for suffix, data in members:
            info = tarfile.TarInfo(f"{sample['key']}.{suffix}")
            info.size = len(data)
            blocks += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    blocks.append(bytes(2 * tarfile.BLOCKSIZE))
    return b"".join(blocks)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _refuse_foreign(folder: Path) -> None:
    """Shards are replaced, anything else is somebody's data."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; handwriting shards need a folder")
    foreign = [path.name for path in folder.glob("*") if path.name != MANIFEST and not _is_shard(path)]
    if foreign:
        raise FileExistsError(f"{folder} holds {foreign[0]!r}, which is no handwriting shard; choose another folder")


def _is_shard(path: Path) -> bool:
    part, _, number = path.stem.partition("-")
    return path.suffix == ".tar" and part in ("align", "instruct", "val", "test") and number.isdigit()


def _swap(new: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
