"""The table of `mmfuse compare`."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from mmfuse.eval.intervals import Estimate
from mmfuse.training.compare.report import markdown_table, milliseconds, notes, short, terminal_table
from mmfuse.training.compare.summary import Row, Scores
from mmfuse.training.measure import Cost, Generation


def row(label: str, mean: float = 0.5, **changes: Any) -> Row:
    scores = Scores(
        exact_match=Estimate(mean, mean - 0.1, mean + 0.1, 2, 2100),
        by_seed=[mean - 0.05, mean + 0.05],
        difference=None if label == "causal" else Estimate(0.012, -0.003, 0.027, 2, 2100),
        blind_exact_match=0.16,
        tokens_per_second=12345.6,
        train_seconds=100.0,
        parameters=345_678,
        cost=Cost(5.1e7, Generation(0.0123, 0.00123, 8192)),
    )
    return replace(Row(label, 1.0, 2000, [0, 1], [], scores), **changes)


def test_table_shows_every_number_and_what_failed() -> None:
    rows = [row("causal"), row("mma", 0.62), row("naavit", failed=[2]), row("saisa", seeds=[], failed=[0], scores=None)]
    lines = markdown_table(rows).replace("\u202f", " ").splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| mma | 62.0 % (52.0–72.0 %) | +1.2 pp (-0.3 to +2.7) | 16.0 % | 12.3 k | 346 k | 51.0 M | 12.3 ms | 1.23 ms "
        "| 8.19 kB |"
    )
    assert lines[4].startswith("| naavit (1 of 3 runs failed) | 50.0 %")
    assert lines[5].startswith("| saisa (1 of 1 runs failed) | failed | – |")
    screen = StringIO()
    Console(file=screen, width=130).print(terminal_table(rows))
    for part in ("against", "52.0–72.0", "+1.2", "failed", "/sample"):
        assert part in screen.getvalue()
    assert "over seeds and questions" in notes(rows)[0]


def test_table_shows_the_factor_of_a_budget() -> None:
    rows = [row("causal"), row("saisa", factor=1.543, steps=3086)]
    lines = markdown_table(rows).splitlines()
    assert lines[0].endswith("| steps |") and lines[3].endswith("| 3,086 (× 1.54) |")


def test_one_seed_is_said_to_be_one_seed() -> None:
    own = row("causal")
    assert own.scores is not None
    alone = replace(own, scores=replace(own.scores, exact_match=replace(own.scores.exact_match, seeds=1)))
    assert "one seed says nothing about others" in notes([alone])[0]
    assert notes([row("causal", scores=None)]) == ["Every run failed."]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (7, "7 "), (999.6, "1.00 k"), (12345, "12.3 k"), (345678, "346 k"), (5.1e13, "51.0 T")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number).replace("\u202f", " ") == text


def test_milliseconds_have_three_digits() -> None:
    said = [milliseconds(seconds).replace("\u202f", " ") for seconds in (0.00123, 0.0123, 0.123, 1.23)]
    assert said == ["1.23 ms", "12.3 ms", "123 ms", "1230 ms"]
