"""What every task of the table keeps: no answer makes it fail, scores are bounded, the order of rows is no matter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfuse.cli import main
from mmfuse.eval.scorers import SCORERS, Result, score_rows

CASES = [(task, protocol) for task, entry in SCORERS.items() for protocol in entry.protocols]
#: The largest value of metrics that are no share.
LARGEST = {"mme": 2800.0}
#: Whose number depends on the order of rows, by the rules of the protocol.
ORDERED = {("mmmu", "official")}

words = st.sampled_from(
    [
        "yes",
        "No",
        "A",
        "(B)",
        "B.",
        "the answer is",
        "not",
        "3",
        "1,000",
        "5%",
        "dog",
        "\n",
        ".",
        ",",
        "ß",
        "İ",
        "",
        "/",
    ]
)
answers = st.text(max_size=30) | st.lists(words, max_size=8).map(" ".join)


def test_every_task_has_example_rows(examples) -> None:
    assert set(examples) == set(SCORERS)


def bounded(task: str, result: Result) -> bool:
    return all(math.isnan(value) or -1e-9 <= value <= LARGEST.get(task, 1.0) + 1e-9 for value in result.values.values())


@pytest.mark.parametrize(("task", "protocol"), CASES, ids=lambda value: value)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_answer_gets_a_bounded_score_in_any_order(examples, task: str, protocol: str, data: st.DataObject) -> None:
    rows = examples[task].with_ids(protocol)
    if examples[task].text:
        rows = [{**row, "prediction": data.draw(answers)} for row in rows]
    result = score_rows(task, rows, protocol, examples[task].resources)
    assert [sample.id for sample in result.samples] == [str(row["id"]) for row in rows]
    if not examples[task].unbounded:
        assert bounded(task, result)
    assert all(len(metric.counts) == len(rows) for metric in result.metrics.values())
    if (task, protocol) not in ORDERED:
        # Rows of a group stay together where the task pairs neighbours.
        turned = score_rows(task, examples[task].turn(rows), protocol, examples[task].resources)
        assert turned.values == pytest.approx(result.values, nan_ok=True)


@pytest.mark.parametrize(("task", "protocol"), CASES, ids=lambda value: value)
def test_the_command_scores_it(examples, task: str, protocol: str, tmp_path: Any, capsys: Any) -> None:
    path = tmp_path / "preds.jsonl"
    rows = examples[task].with_ids(protocol)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    words = ["score", str(path), "--task", task, "--protocol", protocol, "--json"]
    for name, text in (examples[task].resources or {}).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        words += ["--resource", f"{name}={tmp_path / name}"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = score_rows(task, rows, protocol, examples[task].resources).values
    assert printed.keys() == expected.keys()
    assert [np.nan if value is None else value for value in printed.values()] == pytest.approx(
        list(expected.values()), nan_ok=True
    )


@pytest.mark.parametrize("task", SCORERS)
def test_the_primary_metric_comes_first(examples, task: str) -> None:
    entry = SCORERS[task]
    protocol = entry.protocols[0]
    assert (
        next(iter(score_rows(task, examples[task].with_ids(protocol), protocol, examples[task].resources).values))
        == entry.primary
    )


def test_the_documentation_has_every_task_with_its_metric_and_protocols() -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    for name, entry in SCORERS.items():
        protocols = ", ".join(f"`{protocol}`" for protocol in entry.protocols)
        assert f"| `{name}` | `{entry.primary}` | {protocols} |" in page
    assert page.count("\n| `") == len(SCORERS) + 7  # seven options of the command


@pytest.mark.parametrize(("task", "protocol"), CASES, ids=lambda value: value)
def test_sums_over_parts_add_up(examples, task: str, protocol: str) -> None:
    """A metric of resampled clusters is its value of the resampled sums, so counts must not depend on other rows."""
    for name, metric in score_rows(
        task, examples[task].with_ids(protocol), protocol, examples[task].resources
    ).metrics.items():
        half = len(metric.counts) // 2
        together = metric.value(metric.counts[:half].sum(0) + metric.counts[half:].sum(0))
        assert float(together) == pytest.approx(metric.total, nan_ok=True), name
        stacked = metric.value(np.stack([metric.counts.sum(0)] * 3))
        assert stacked == pytest.approx(np.full(3, metric.total), nan_ok=True), name
