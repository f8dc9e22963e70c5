from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mmfuse.errors import DataError, RunError
from mmfuse.eval.evalreport import calibration, worst, write_evaluation
from mmfuse.eval.paired import compare_folders, holm, paired
from mmfuse.eval.runner import TaskRun
from mmfuse.eval.scorers.records import mean
from mmfuse.eval.scoring import estimate, judge, score_run


def run_of(task, answers, errors=()):
    records = []
    for item, text in zip(task.items, answers, strict=True):
        record = {"id": item.id, "prediction": text, "target": item.target, "category": item.category,
                  "cluster": item.cluster or item.id, "prompt": "<b>?", "media": [], "key": "k", "finished": True,
                  "tokens": 2, "logprob": -0.1 if text == "no" else -1.0, "margin": 1.0}  # fmt: skip
        if item.id in errors:
            record |= {"prediction": "", "error": "decode: broken"}
        records.append(record)
    return TaskRun(task, tuple(records), len(records), 0)


def test_samples_that_could_not_be_asked_are_wrong_or_left_out(small_task):
    task = small_task(4)
    run = run_of(task, ["yes", "yes", "no", ""], errors=("q3",))
    score = score_run(run)
    assert score.primary[1].value == pytest.approx(2 / 4)
    assert score.metrics["exact_match/c1"].value == pytest.approx(1 / 2)
    assert score.metrics["exact_match/c0"].value == pytest.approx(1 / 2)
    assert score_run(run, "skip").primary[1].value == pytest.approx(2 / 3)
    assert "1 of 4 samples could not be asked" in score.warnings[0]
    with pytest.raises(RunError, match="none of 4 samples"):
        score_run(run_of(task, [""] * 4, errors=[item.id for item in task.items]))
    assert judge(task, run.records[:3]) == (pytest.approx(2 / 3), 0)


def test_an_interval_knows_which_samples_belong_together():
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.6).astype(float)
    alone = estimate(mean(values), [str(i) for i in range(200)])
    error = values.std(ddof=1) / math.sqrt(200)
    assert alone.high - alone.low == pytest.approx(2 * 1.9719565 * error, rel=1e-6)
    copies = estimate(mean(np.repeat(values, 4)), [str(i) for i in np.repeat(np.arange(200), 4)])
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
    few = estimate(mean([1.0] * 12), [str(i // 4) for i in range(12)])
    assert few.method == "wilson" and few.clusters == 3 and few.low == pytest.approx(0.4385, abs=1e-3)


def test_paired_differences_by_hand():
    first = {str(i): (float(i % 2), str(i)) for i in range(10)}
    second = {str(i): (float(i % 2 or i < 4), str(i)) for i in range(10)}
    found = paired("t", first, second)
    values = np.array([second[str(i)][0] - first[str(i)][0] for i in range(10)])
    error = values.std(ddof=1) / math.sqrt(10)
    assert found.difference == pytest.approx(0.2) and found.clusters == 10
    assert found.high - found.difference == pytest.approx(2.2621572 * error)
    assert found.p == pytest.approx(0.1679, abs=1e-3)
    same = paired("t", first, first)
    assert (same.low, same.high, same.p) == (-0.1, 0.1, 1.0) and math.isnan(same.detectable)
    with pytest.raises(DataError, match="only one of the evaluations"):
        paired("t", first, {"0": (1.0, "0")})


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_files_of_an_evaluation(small_task, tmp_path):
    task = small_task(6)
    identity = {"fusion": "mma", "weights": "a" * 64}
    score = score_run(run_of(task, ["yes", "no", "no", "yes", "yes", ""], errors=("q5",)))
    assert [record["id"] for record, _ in worst(score)] == ["q1", "q2"]
    error, table = calibration(score)
    assert sum(row[2] for row in table) == 5 and 0 < error < 1
    write_evaluation(tmp_path / "a", [score], identity)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "&lt;b&gt;?" in page and "<b>?" not in page and "data:image/png" in page and "q5: decode: broken" in page
    found = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]["small"]
    assert found["errors"] == {"q5": "decode: broken"} and found["metrics"]["exact_match"]["value"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples" / "small.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1, 0, 0, 1, 1, 0]
    write_evaluation(tmp_path / "b", [score_run(run_of(task, ["yes"] * 6))], identity)
    (compared,) = compare_folders(tmp_path / "a", tmp_path / "b")
    assert compared.difference == pytest.approx(0.5)
    write_evaluation(tmp_path / "c", [score_run(run_of(small_task(5), ["yes"] * 5))], identity)
    with pytest.raises(DataError, match="differ in their questions"):
        compare_folders(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        compare_folders(tmp_path / "a", tmp_path)
