from __future__ import annotations

import math

import pytest

from mmfuse.eval.biases import hallucination_by_position, letter_bias, of_answers, yes_bias


def rows(pairs, category=""):
    return [{"id": str(i), "prediction": said, "target": right, "category": category, "cluster": str(i)}
            for i, (said, right) in enumerate(pairs)]  # fmt: skip


def test_a_model_that_always_says_yes_is_found_out():
    held = rows([("Yes.", "yes")] * 10 + [("yes, it is", "no")] * 10 + [("perhaps", "no")] * 5, "random")
    found = yes_bias(held)["random"]
    assert found == yes_bias(held)["all"]
    assert (found["said"], found["right"], found["other"]) == (0.8, 0.4, 0.2)
    assert found["bias"] == pytest.approx(0.4) and found["low"] > 0.1
    fair = yes_bias(rows([("yes", "yes"), ("no", "no"), ("no", "yes"), ("yes", "no")]))["all"]
    assert fair["bias"] == 0 and fair["low"] < 0 < fair["high"]


def test_a_model_that_always_says_a_has_the_largest_spread():
    always = letter_bias(rows([("A", right) for right in "ABCD" * 5]))
    assert always["letters"]["A"] == {"said": 1.0, "right": 0.25, "recall": 1.0}
    assert always["recall_std"] == pytest.approx(math.sqrt(3) / 4)
    perfect = letter_bias(rows([(right + ".", right) for right in "ABCD" * 5]))
    assert perfect["recall_std"] == 0 and perfect["other"] == 0


def test_made_up_mentions_are_counted_where_they_stand():
    held = rows([("12 34 99 and 34", "12 34 56")] * 4 + [("12 34", "12 34"), ("", "99 12")])
    found = hallucination_by_position(held)
    # 12, 34 and 99 and a second 34; "and" is no mention; 99 and the second 34 are made up.
    assert [part["mentions"] for part in found["bins"]] == [5, 4, 5, 0, 4]
    assert [part["invented"] for part in found["bins"]] == [0, 0, 4, 0, 4]
    assert math.isnan(found["bins"][3]["rate"]) and found["bins"][2]["rate"] == 0.8
    assert found["survival"] == [
        {"mentions": 1, "answers": 5, "sound": 1.0},
        {"mentions": 2, "answers": 5, "sound": 1.0},
    ]


def test_each_task_has_the_biases_that_it_can_show(small_task):
    task = small_task(4)
    held = [{**row, "id": item.id} for row, item in zip(rows([("yes", "yes")] * 4), task.items, strict=True)]
    assert list(of_answers(task, held)) == ["yes"]
    assert of_answers(task, [{**row, "error": "broken"} for row in held]) == {}
