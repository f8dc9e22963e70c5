"""Which files each benchmark is published in, below a data folder, and how a record becomes a question."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmfuse.errors import ConfigError, DataError, unknown
from mmfuse.eval.datasets.files import (
    Medium,
    Question,
    Reader,
    Record,
    base64_medium,
    file_medium,
    need,
    parquet_medium,
    read_json,
    read_jsonl,
    read_parquet,
    read_tsv,
)

_PLACEHOLDER = re.compile(r"<\w+>")
#: A base64 cell that is shorter holds an index instead of a picture.
_SHORTEST_IMAGE = 64
#: From a record, its file and its number to the question.
Maker = Callable[[Record, Path, int], Question]


@dataclass(frozen=True)
class Benchmark:
    """The files of a benchmark.

    Attributes:
        name: of the data set; several can have one scorer.
        task: the scorer's.
        patterns: of the files, below the data folder, in any folder depth; the first pattern with a match counts.
        read: the records of a file.
        make: the question of a record.
    """

    name: str
    task: str
    patterns: tuple[str, ...]
    read: Reader
    make: Maker


@dataclass(frozen=True)
class Found:
    """What is there of a benchmark.

    Attributes:
        benchmark: whose.
        files: in order of their names; empty if there is none.
    """

    benchmark: Benchmark
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """The size of the files."""
        return sum(path.stat().st_size for path in self.files)


def find_files(root: Path, benchmark: Benchmark) -> Found:
    """The files of a benchmark below a folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(f"--data-root {root}: there is no such folder")
    for pattern in benchmark.patterns:
        files = sorted(path for path in root.rglob(pattern) if path.is_file())
        if files:
            return Found(benchmark, tuple(files))
    return Found(benchmark, ())


def read_questions(root: Path, name: str) -> Iterator[Question]:
    """The questions of a benchmark, in the order of its files.

    Raises:
        ConfigError: there is no such benchmark.
        FileNotFoundError: none of its files is below `root`; the message names the patterns.
        DataError: a record that cannot be used, or an id that occurs twice.
    """
    if name not in BENCHMARKS:
        raise ConfigError(unknown("benchmark", name, BENCHMARKS))
    benchmark = BENCHMARKS[name]
    found = find_files(root, benchmark)
    if not found.files:
        raise FileNotFoundError(f"{name}: none of {', '.join(benchmark.patterns)} is below {root}")
    seen: set[str] = set()
    for path in found.files:
        for number, record in enumerate(benchmark.read(path)):
            question = benchmark.make(record, path, number)
            if question.id in seen:
                raise DataError(f"{path}: the id {question.id!r} occurs twice")
            seen.add(question.id)
            yield question


def _question(own: Any, text: Any, media: tuple[Medium, ...], **row: Any) -> Question:
    return Question(str(own), str(text), media, {"id": str(own), **row})


def _tsv(record: Record, path: Path, number: int, task: str) -> Question:
    """VLMEvalKit's columns: index, question, hint, A.., answer, category, l2-category, image."""
    own = need(record, "index", path)
    options = {letter: record[letter] for letter in string.ascii_uppercase if letter in record}
    lines = [record["hint"]] if "hint" in record else []
    lines += [need(record, "question", path), *(f"{letter}. {text}" for letter, text in options.items())]
    image = need(record, "image", path)
    fields: dict[str, Any] = {key: record[key] for key in ("category", "l2-category", "split") if key in record}
    if task == "mmbench":
        fields["index"] = int(own)
    if task == "mmstar" and "l2-category" in fields:
        fields["l2_category"] = fields["l2-category"]
    media = (base64_medium(image, f"{path.name}, index {own}"),)
    if "image_path" in record:
        fields["image"] = record["image_path"]
    if task == "hallusionbench":
        fields["index"] = own
    if options:
        fields["options"] = options
    return _question(own, "\n".join(lines), media, target=need(record, "answer", path), **fields)


def _read_vlmevalkit(path: Path) -> Iterator[Record]:
    """The records of a TSV file; a record without a picture of its own holds the index of the record that has it."""
    images: dict[str, str] = {}
    for record in read_tsv(path):
        image = str(need(record, "image", path))
        if len(image) < _SHORTEST_IMAGE:
            if image not in images:
                raise DataError(
                    f"{path}: record {record.get('index')} takes the image of {image!r}, which is not above it"
                )
            record["image"] = images[image]
        else:
            images[str(need(record, "index", path))] = image
        yield record


def _pope(record: Record, path: Path, number: int) -> Question:
    image = need(record, "image", path)
    split = path.stem.rsplit("_", 1)[-1]
    media = (file_medium(path.parent / image),)
    own = f"{path.stem}/{need(record, 'question_id', path)}"
    return _question(
        own, need(record, "text", path), media, target=need(record, "label", path), category=split, image=image
    )


def _read_vqa(path: Path) -> Iterator[Record]:
    """Annotations with their questions, which stand in a file of their own beside them."""
    name = path.name.replace("mscoco", "OpenEnded_mscoco").replace("annotations", "questions")
    asked = {record["question_id"]: record["question"] for record in read_json(path.with_name(name), "questions")}
    for record in read_json(path, "annotations"):
        own = need(record, "question_id", path)
        if own not in asked:
            raise DataError(f"{path}: question {own} is not in {name}")
        yield {**record, "question": asked[own]}


def _vqa(record: Record, path: Path, number: int) -> Question:
    own, image = need(record, "question_id", path), need(record, "image_id", path)
    split = "val2014" if "val2014" in path.name else "train2014"
    media = (file_medium(path.parent / split / f"COCO_{split}_{int(image):012d}.jpg"),)
    kind = {"answer_type": record["answer_type"]} if "answer_type" in record else {}
    return _question(
        own, need(record, "question", path), media, target=need(record, "answers", path), image=str(image), **kind
    )


def _textvqa(record: Record, path: Path, number: int) -> Question:
    image = need(record, "image_id", path)
    media = (file_medium(path.parent / "train_images" / f"{image}.jpg"),)
    own, question = need(record, "question_id", path), need(record, "question", path)
    return _question(own, question, media, target=need(record, "answers", path), image=image)


def _docvqa(record: Record, path: Path, number: int) -> Question:
    image = record.get("image") or need(record, "image_local_name", path)
    own, question = need(record, "questionId", path), need(record, "question", path)
    return _question(
        own, question, (file_medium(path.parent / image),), target=need(record, "answers", path), image=image
    )


def _chartqa(record: Record, path: Path, number: int) -> Question:
    image, split = need(record, "imgname", path), path.stem.rsplit("_", 1)[-1]
    media = (file_medium(path.parent / "png" / image),)
    own = f"{path.stem}/{number}"
    return _question(
        own, need(record, "query", path), media, target=need(record, "label", path), split=split, image=image
    )


def _scienceqa(record: Record, path: Path, number: int) -> Question:
    own, choices = need(record, "_key", path), need(record, "choices", path)
    image = record.get("image")
    media = (file_medium(path.parent / "images" / need(record, "split", path) / str(own) / image),) if image else ()
    lines = [f"Context: {record['hint']}"] if record.get("hint") else []
    lines += [
        need(record, "question", path),
        *(f"{a}. {b}" for a, b in zip(string.ascii_uppercase, choices, strict=False)),
    ]
    target = need(record, "answer", path)
    return _question(own, "\n".join(lines), media, target=target, choices=choices, has_image=bool(image))


def _mmmu(record: Record, path: Path, number: int) -> Question:
    own, text = need(record, "id", path), str(need(record, "question", path))
    options = str(record.get("options", "[]"))
    named = sorted(set(re.findall(r"<image (\d+)>", text + options)), key=int)
    media = [parquet_medium(need(record, f"image_{one}", path), f"{own}, image {one}") for one in named]
    kind = need(record, "question_type", path)
    fields = {"options": options, "question_type": kind}
    return _question(own, text, tuple(one for one in media if one), target=need(record, "answer", path), **fields)


def _mathvista(record: Record, path: Path, number: int) -> Question:
    own = need(record, "pid", path)
    image = parquet_medium(need(record, "decoded_image", path), f"{own}, image")
    keys = ("question_type", "answer_type", "choices", "precision")
    fields = {key: record[key] for key in keys if key in record}
    about = record.get("metadata") or {}
    fields |= {key: about[key] for key in ("task", "skills") if key in about}
    text = record.get("query") or need(record, "question", path)
    return _question(own, text, (image,) if image else (), target=need(record, "answer", path), question=text, **fields)


def _ifeval(record: Record, path: Path, number: int) -> Question:
    own, text = need(record, "key", path), need(record, "prompt", path)
    fields = {key: need(record, key, path) for key in ("instruction_id_list", "kwargs")}
    return _question(own, text, (), target="", **fields)


def _hallusion(record: Record, path: Path, number: int) -> Question:
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    place = {key: need(record, key, path) for key in keys}
    own = "_".join(map(str, place.values()))
    file = record.get("filename")
    media = (file_medium(path.parent / file),) if file else ()
    fields = {**place, "gt_answer_details": record.get("gt_answer_details", ""), "question": record["question"]}
    return _question(own, need(record, "question", path), media, target=need(record, "gt_answer", path), **fields)


def _music(record: Record, path: Path, number: int) -> Question:
    """The official key is `anser`; the placeholders of a question are filled from its values."""
    text, video = need(record, "question_content", path), need(record, "video_id", path)
    for value in re.findall(r'"([^"]*)"', record.get("templ_values", "")):
        place = _PLACEHOLDER.search(text)
        text = text if place is None else text[: place.start()] + value + text[place.end() :]
    media = (file_medium(path.parent / "video" / f"{video}.mp4"),)
    own, target = need(record, "question_id", path), need(record, "anser", path)
    return _question(own, text, media, target=target, type=need(record, "type", path), video_id=video)


def _of_key(key: str) -> Reader:
    return lambda path: read_json(path, key)


def _of_tsv(name: str, task: str, *patterns: str) -> Benchmark:
    return Benchmark(name, task, patterns, _read_vlmevalkit, partial(_tsv, task=task))


_ALL = (
    _of_tsv("mmbench_dev_en", "mmbench", "MMBench_DEV_EN*.tsv", "mmbench_dev_en*.tsv"),
    _of_tsv("mmbench_dev_cn", "mmbench", "MMBench_DEV_CN*.tsv", "mmbench_dev_cn*.tsv"),
    _of_tsv("seedbench_img", "seedbench", "SEEDBench_IMG*.tsv"),
    _of_tsv("ai2d", "ai2d", "AI2D_TEST*.tsv"),
    _of_tsv("realworldqa", "realworldqa", "RealWorldQA*.tsv"),
    _of_tsv("mmstar", "mmstar", "MMStar*.tsv"),
    _of_tsv("mmvp", "mmvp", "MMVP*.tsv"),
    _of_tsv("mme", "mme", "MME.tsv"),
    _of_tsv("hallusionbench_tsv", "hallusionbench", "HallusionBench*.tsv"),
    Benchmark("pope", "pope", ("coco_pope_*.json",), read_jsonl, _pope),
    Benchmark("vqav2", "vqav2", ("v2_mscoco_val2014_annotations.json",), _read_vqa, _vqa),
    Benchmark("okvqa", "okvqa", ("mscoco_val2014_annotations.json",), _read_vqa, _vqa),
    Benchmark("textvqa", "textvqa", ("TextVQA_0.5.1_val.json",), _of_key("data"), _textvqa),
    Benchmark("docvqa", "docvqa", ("val_v1.0*.json",), _of_key("data"), _docvqa),
    Benchmark("infovqa", "infovqa", ("infographicsVQA_val*.json",), _of_key("data"), _docvqa),
    Benchmark("chartqa", "chartqa", ("test_*.json",), read_json, _chartqa),
    Benchmark("scienceqa", "scienceqa", ("problems.json",), read_json, _scienceqa),
    Benchmark("mmmu", "mmmu", ("validation-*.parquet",), read_parquet, _mmmu),
    Benchmark("mathvista", "mathvista", ("testmini-*.parquet",), read_parquet, _mathvista),
    Benchmark("ifeval", "ifeval", ("ifeval_input_data.jsonl",), read_jsonl, _ifeval),
    Benchmark("hallusionbench", "hallusionbench", ("HallusionBench.json",), read_json, _hallusion),
    Benchmark("music_avqa", "music_avqa", ("json_update/avqa-test.json", "avqa-test.json"), read_json, _music),
)
#: All data sets by name.
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
