"""CHAIR and AMBER: objects in captions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.cli import main
from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.scorers import score_rows
from mmfuse.eval.text.objects import ObjectNames, singular

#: A few lines of our own, in the form of the official file: a stray space, names of two words.
SYNONYMS = """person, man, woman, child, people, rider
motorcycle, scooter,  motor bike
bus, minibus
dog, puppy
bear
teddy bear, teddybear
toilet
chair, seat
tie, bow, bow tie
wine glass
tennis racket, racket
train, locomotive
dining table, table
"""
NAMES = {"synonyms": SYNONYMS}


@pytest.mark.parametrize(
    ("caption", "official", "corrected"),
    [
        ("Two puppies and a teddy bear.", ["dog", "teddy bear"], None),
        ("a bus", [], ["bus"]),
        ("two buses", ["bus"], None),
        ("A motor bike", [], ["motorcycle"]),
        ("the toilet seat", ["toilet"], None),
        ("a seat near the toilet", ["toilet"], None),
        ("a passenger train with people", ["train", "person"], None),
        ("a baby bear", ["bear"], None),
        ("a man's bow tie, wine glasses", ["person", "tie", "wine glass"], None),
        ("a tennis racket", ["tennis racket"], None),
        ("the dining table", ["dining table"], None),
        ("a dog-like thing", [], None),
        ("men (and women); children!", ["person", "person", "person"], None),
    ],
)
def test_mentions(caption: str, official: list[str], corrected: list[str] | None) -> None:
    exact, loose = ObjectNames(SYNONYMS), ObjectNames(SYNONYMS, exact=False)
    assert [own for _, own in exact.mentions(caption)] == official
    assert [own for _, own in loose.mentions(caption)] == (official if corrected is None else corrected)


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("dogs", "dog"),
        ("boxes", "box"),
        ("knives", "knife"),
        ("wolves", "wolf"),
        ("berries", "berry"),
        ("glass", "glas"),
    ],
)
def test_singular(plural: str, one: str) -> None:
    assert singular(plural) == one


@given(st.text())
def test_mentions_are_total(caption: str) -> None:
    for word, own in ObjectNames(SYNONYMS).mentions(caption):
        assert word
        assert own in SYNONYMS


def test_chair_by_hand() -> None:
    rows = [
        {"id": 1, "prediction": "A dog and a man on a table.", "target": ["dog", "person"]},
        {"id": 2, "prediction": "A dog.", "target": ["bear"], "captions": ["puppies beside a bear"]},
        {"id": 3, "prediction": "Nothing here.", "target": ["tie"]},
    ]
    result = score_rows("chair", rows, "official", NAMES)
    assert result.values == {
        "chair_i": 0.25,
        "chair_s": pytest.approx(1 / 3),
        "recall": 0.6,
        "mentions_per_caption": pytest.approx(4 / 3),
        "words_per_caption": pytest.approx(12 / 3),
    }
    assert [sample.parsed for sample in result.samples] == ["table", "", ""]


def test_word_lists_are_needed_and_read_by_the_command(tmp_path, capsys) -> None:
    rows = [{"id": 1, "prediction": "a dog", "target": ["dog"]}]
    with pytest.raises(ConfigError, match=r"needs the resource 'synonyms': data/synonyms\.txt of"):
        score_rows("chair", rows)
    with pytest.raises(DataError, match="row 1: the object 'cat' is in no line"):
        score_rows("chair", [{**rows[0], "target": ["cat"]}], None, NAMES)
    (tmp_path / "s.txt").write_text(SYNONYMS)
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]))
    command = ["score", str(tmp_path / "p.jsonl"), "--task", "chair", "--json", "--resource"]
    assert main([*command, f"synonyms={tmp_path / 's.txt'}"]) == 0
    assert json.loads(capsys.readouterr().out)["chair_i"] == 0.0
    assert main([*command, "synonyms"]) == 2


AMBER = {"relation": json.dumps({"sky": [], "car": ["vehicle"], "person": ["man"], "dog": []}), "safe_words": "sign\n"}


def test_amber_by_hand() -> None:
    target = {"truth": ["sky", "car"], "hallu": ["person", "dog"]}
    rows = [
        {"id": 1, "prediction": "Vehicles under the sky, and a sign.", "target": target},
        {"id": 2, "prediction": "A man in a car.", "target": target},
    ]
    result = score_rows("amber_generative", rows, None, AMBER)
    assert result.values == {"chair": 0.25, "cover": 0.75, "hal": 0.5, "cog": 0.25}
    assert "not comparable" in result.warnings[0]
    with pytest.raises(DataError, match="'cat' is not in the resource"):
        score_rows("amber_generative", [{**rows[0], "target": {"truth": ["cat"], "hallu": []}}], None, AMBER)
