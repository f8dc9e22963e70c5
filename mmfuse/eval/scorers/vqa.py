"""Short answers to questions about images: VQAv2, TextVQA, VizWiz, OK-VQA and GQA.

The VQA accuracy compares with the answers of ten people: leave each person out in turn, count how many of the others
gave this answer, and take min(1, count / 3), on average over the ten (Antol et al. 2015; Goyal et al. 2017).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from mmfuse.errors import DataError
from mmfuse.eval.scorers.records import (
    Result,
    Row,
    Sample,
    by_category,
    clusters,
    identity,
    mean,
    optional,
    required,
    text,
    texts,
)
from mmfuse.eval.text import evalai, vqa_lmms, vqa_official, vqa_vlmevalkit

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def vqav2(rows: Sequence[Row], protocol: str) -> Result:
    """VQAv2 and OK-VQA.

    `official` (GT-Vision-Lab/VQA) compares the plain texts if all ten answers are the same, so "Yes" is then wrong for
    "yes". `lmms` and `vlmevalkit` always normalise.
    """
    normal = {"official": vqa_official, "lmms": vqa_lmms, "vlmevalkit": vqa_vlmevalkit}[protocol]
    return _people(rows, normal, plain_if_agreed=protocol == "official")


def textvqa(rows: Sequence[Row], protocol: str) -> Result:
    """TextVQA, with EvalAI's processor; `vlmevalkit` normalises by its own rules."""
    return _people(rows, vqa_vlmevalkit if protocol == "vlmevalkit" else evalai)


def evalai_people(rows: Sequence[Row], protocol: str) -> Result:
    """VizWiz and OK-VQA: `official` by the VQA evaluation code, `lmms` with EvalAI's processor."""
    if protocol == "lmms":
        return _people(rows, evalai)
    return vqav2(rows, protocol)


def person_accuracy(matches: int, people: int) -> float:
    """The mean over leave-one-out subsets of min(1, others who agree / 3), from how many of all agree."""
    return (matches * min(1.0, (matches - 1) / 3) + (people - matches) * min(1.0, matches / 3)) / people


def _people(rows: Sequence[Row], normal: Callable[[str], str], *, plain_if_agreed: bool = False) -> Result:
    samples, few = [], 0
    for row in rows:
        given, answers = text(row), _answers(row)
        few += len(answers) != 10
        if plain_if_agreed:
            given, answers = _one_line(given), [_one_line(answer) for answer in answers]
        if not plain_if_agreed or len(set(answers)) > 1:
            given, answers = normal(given), [normal(answer) for answer in answers]
        score = person_accuracy(answers.count(given), len(answers))
        category = optional(row, "answer_type", "category")
        samples.append(Sample(identity(row), score, given, "text", clusters(row, "image_id", "image"), category))
    warnings = (f"{few} questions have not ten answers; the official accuracy is defined for ten",) if few else ()
    metrics = {"accuracy": mean(sample.score for sample in samples), **by_category("accuracy", samples)}
    return Result(tuple(samples), metrics, warnings)


def _answers(row: Row) -> list[str]:
    """Ten texts, or the objects `{"answer": …}` of the annotation files."""
    value = required(row, "target")
    if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
        if not all(isinstance(item.get("answer"), str) for item in value):
            raise DataError(f"row {identity(row)}: each object in 'target' needs an 'answer'")
        return [item["answer"] for item in value]
    return texts(row)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def gqa(rows: Sequence[Row], protocol: str) -> Result:
    """GQA: the same string, after what everybody does to a prediction before the official script sees it.

    `official` takes trailing periods off and lowers the case (LLaVA's converter) and compares exactly; `lmms` lowers
    both and deletes all punctuation, so "t-shirt" is "tshirt" (NumPy cuts what lower-casing lengthens there, such as
    "İ"; here it is not cut); `vlmevalkit` strips and lowers both.
    The official file also gives `types`; then accuracies by structural and semantic type are added.
    """
    samples, structural, semantic = [], [], []
    for row in rows:
        given, target = text(row), text(row, "target")
        if protocol == "official":
            given = given.rstrip(".").lower()
        elif protocol == "lmms":
            given, target = given.lower().translate(_PUNCTUATION), target.lower().translate(_PUNCTUATION)
        else:
            given, target = given.strip().lower(), target.strip().lower()
        kinds = row.get("types") or {}
        structural.append(str(kinds.get("structural", "")))
        semantic.append(str(kinds.get("semantic", "")))
        samples.append(
            Sample(
                identity(row), float(given == target), given, "text", clusters(row, "imageId", "image"), structural[-1]
            )
        )
    metrics = {"accuracy": mean(sample.score for sample in samples)}
    if any(structural):
        # Official: every other structural type asks for yes or no, or for one of two; `query` is open.
        scored = list(zip(samples, structural, strict=True))
        metrics["open"] = mean(sample.score if kind == "query" else None for sample, kind in scored)
        metrics["binary"] = mean(sample.score if kind and kind != "query" else None for sample, kind in scored)
    metrics |= by_category("accuracy", samples)
    for kind in dict.fromkeys(filter(None, semantic)):
        pairs = zip(samples, semantic, strict=True)
        metrics[f"accuracy/{kind}"] = mean(sample.score if own == kind else None for sample, own in pairs)
    return Result(tuple(samples), metrics)
