"""Short forms for the tests of scorers, and a few rows for every task of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mmfuse.eval.scorers import Sample, score_rows

One = Callable[..., Sample]
Rows = list[dict[str, Any]]


def backwards(rows: Rows) -> Rows:
    return rows[::-1]


def neighbours(rows: Rows) -> Rows:
    """Pairs of neighbours in reverse order, each as it was."""
    return [row for start in range(len(rows) - 2, -1, -2) for row in rows[start : start + 2]]


@dataclass(frozen=True)
class Example:
    """Rows of a task, without ids.

    Attributes:
        rows: with `prediction` and `target`.
        text: predictions are texts, any of which may be given.
        turn: another order of rows that changes no metric.
        unbounded: metrics are no shares.
        by_protocol: fields that rows of a protocol have, too.
        resources: files of the benchmark, by name.
    """

    rows: Sequence[dict[str, Any]]
    text: bool = True
    turn: Callable[[Rows], Rows] = backwards
    unbounded: bool = False
    by_protocol: dict[str, dict[str, Any]] | None = None
    resources: dict[str, str] | None = None

    def with_ids(self, protocol: str) -> Rows:
        extra = (self.by_protocol or {}).get(protocol, {})
        return [{"id": str(number), **row, **extra} for number, row in enumerate(self.rows)]


@pytest.fixture(scope="session")
def examples() -> dict[str, Example]:
    """Of every task, by name."""
    return EXAMPLES


@pytest.fixture
def one() -> One:
    """Scores a single row: `one("pope", "official", "Yes.", "yes")`."""

    def call(task: str, protocol: str, prediction: Any, target: Any, **fields: Any) -> Sample:
        row = {"id": "1", "prediction": prediction, "target": target, **fields}
        return score_rows(task, [row], protocol).samples[0]

    return call


def _answers(target: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"prediction": said, "target": target, **fields} for said in ("dog", "Yes.", "The answer is (B)", "")]


_TEN = ["yes"] * 4 + ["no"] * 3 + ["2", "two", "dog"]
_LETTERS = [
    {"prediction": said, "target": "B", "options": ["cat", "dog", "bird"]} for said in ("B", "dog", "(A)", "unclear")
]
_YES_NO = [
    {"prediction": said, "target": right} for said, right in zip(("Yes", "no.", "No", "?"), "yn" * 2, strict=True)
]
_YES_NO = [{**row, "target": {"y": "yes", "n": "no"}[row["target"]]} for row in _YES_NO]

EXAMPLES: dict[str, Example] = {
    "exact_match": Example(_answers(["Dog", "yes."])),
    "vqav2": Example(_answers(_TEN, answer_type="other")),
    "textvqa": Example(_answers(_TEN)),
    "vizwiz": Example(_answers(_TEN)),
    "okvqa": Example(_answers(_TEN)),
    "gqa": Example(_answers("dog", types={"structural": "query", "semantic": "obj"})),
    "docvqa": Example(_answers(["dogs", "cat"])),
    "infovqa": Example(_answers("dogs")),
    "stvqa": Example(_answers(["dogs"])),
    "chartqa": Example(_answers("5", split="human")),
    "multiple_choice": Example(_LETTERS),
    "mmbench": Example(
        [{**row, "index": (number % 2) + 1_000_000 * (number // 2)} for number, row in enumerate(_LETTERS)]
    ),
    "seedbench": Example([{**row, "data_type": "image", "question_type_id": 3} for row in _LETTERS]),
    "ai2d": Example(_LETTERS),
    "realworldqa": Example(_LETTERS),
    "cv_bench": Example(
        [{**row, "source": source} for row, source in zip(_LETTERS, ["ADE20K", "COCO", "Omni3D", "COCO"], strict=True)]
    ),
    "mmstar": Example(
        [{**row, "l2_category": "math"} for row in _LETTERS], by_protocol={"lmms": {"l2_category": "geometry"}}
    ),
    "scienceqa": Example([{**row, "has_image": number < 2} for number, row in enumerate(_LETTERS)]),
    "mmmu": Example([*_LETTERS, *_answers(["dog", "3"], question_type="open")]),
    "mmvp": Example(_LETTERS, turn=neighbours),
    "pope": Example([{**row, "category": kind} for row in _YES_NO for kind in ("random", "popular")]),
    "mme": Example([{**row, "category": task} for task in ("count", "OCR") for row in _YES_NO], turn=neighbours),
    "hallusionbench": Example(
        [
            {
                **row,
                "category": "VD",
                "subcategory": "map",
                "set_id": 1,
                "figure_id": number // 2,
                "question_id": number,
            }
            for number, row in enumerate(_YES_NO)
        ],
        by_protocol={
            "official": {"judgement": "correct", "judge": "gpt-4"},
            "substitute": {"judgement": "It is unclear.", "judge": "other"},
        },
    ),
    "asr": Example(
        [{"prediction": said, "target": "two dogs"} for said in ("two dogs", "2 dogs", "", "Two cats.")],
        unbounded=True,
        resources={"spelling": '{"colour": "color"}'},
    ),
    "classification": Example(
        [{"prediction": said, "target": right} for said, right in (("dog", "dog"), ("cat", "dog"), ("dog", "cat"))],
        unbounded=True,
    ),
    "ave": Example(
        [{"prediction": [said] * 2, "target": ["dog", "background"]} for said in ("dog", "cat", "background")],
        text=False,
    ),
    "music_avqa": Example(_answers("two", type=["Audio", "Counting"])),
    "eeg_retrieval": Example(
        [{"prediction": [0.1, 0.5, 0.2, number / 4], "target": 1} for number in range(4)], text=False
    ),
    "events": Example(
        [{"prediction": [[10, 20]], "target": own, "duration": 600} for own in ([[15, 30]], [], [[300, 310]])],
        text=False,
        unbounded=True,
    ),
    "ifeval": Example(
        [
            {"prediction": said, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
            for said in ("yes, no", "yes", "")
        ]
    ),
    "llava_bench": Example(
        [{"prediction": "x", "target": "y", "judgement": said, "category": "conv"} for said in ("8 9\nx", "x", "10 5")],
        unbounded=True,
        by_protocol={"official": {"judge": "gpt-4-0314"}, "substitute": {"judge": "other"}},
    ),
    "mm_vet": Example(
        [{"prediction": "x", "target": "y", "judgement": said, "capability": ["ocr"]} for said in ("0.5", "x", "1.0")],
        by_protocol={"official": {"judge": "gpt-4-0613"}, "substitute": {"judge": "other"}},
    ),
    "refcoco": Example(
        [
            {"prediction": said, "target": [0, 0, 40, 20], "width": 100, "height": 50, "convention": "unit"}
            for said in ("[0, 0, 0.4, 0.4]", "(0,0),(400,400)", "[[0,0,200,200]]", "nowhere")
        ]
    ),
    "coco_captions": Example(_answers(["a dog", "the dog runs"]), unbounded=True),
    "audio_captions": Example(_answers(["a dog barks"]), unbounded=True),
    "mathvista": Example(
        [
            {**row, "target": "dog", "question_type": "multi_choice", "answer_type": "text", "extraction": "B"}
            for row in _LETTERS
        ]
    ),
    "chair": Example(
        [{"prediction": said, "target": ["dog"], "captions": ["a cat"]} for said in ("a dog", "two cats", "", "birds")],
        resources={"synonyms": "dog, puppy\ncat\nbird"},
        unbounded=True,
    ),
    "amber_generative": Example(
        [{"prediction": said, "target": {"truth": ["dog"], "hallu": ["cat"]}} for said in ("a dog", "cats", "", "x")],
        resources={"relation": '{"dog": ["puppy"], "cat": []}', "safe_words": "sign"},
    ),
    "amber_discriminative": Example([{**row, "type": "discriminative-hallucination"} for row in _YES_NO]),
}
