from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mmfuse.errors import DataError, RunError
from mmfuse.eval.evalreport import calibration, worst, write_evaluation
from mmfuse.eval.paired import compare_folders, paired
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


def rows(answers, errors=()):
    made = [{"id": str(i), "prediction": text, "target": "yes", "cluster": str(i), "score": float(text == "yes")}
            for i, text in enumerate(answers)]  # fmt: skip
    return [row | {"error": "broken"} if row["id"] in errors else row for row in made]


def test_rows_of_two_models_are_paired_by_id():
    said = ["yes", "no"] * 5
    better = ["yes"] * 4 + said[4:]
    found = paired("t", "exact_match", "official", rows(said), list(reversed(rows(better))))
    assert (found.first, found.second, found.n) == (0.5, 0.7, 10)
    assert found.comparison.p == pytest.approx(0.1679, abs=1e-3)
    lost = paired("t", "exact_match", "official", rows(said, errors=["1"]), rows(better))
    assert lost.comparison.difference == pytest.approx(0.2) and lost.n == 10
    lost = paired("t", "exact_match", "official", rows(said), rows(better, errors=["0", "1"]))
    assert lost.second == pytest.approx(0.5)
    with pytest.raises(DataError, match="only one of the evaluations"):
        paired("t", "exact_match", "official", rows(said), rows(said[:1]))
    with pytest.raises(DataError, match="no sample that both"):
        paired("t", "exact_match", "official", rows(["yes"], errors=["0"]), rows(["yes"]))


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
    assert compared.comparison.difference == pytest.approx(0.5)
    write_evaluation(tmp_path / "c", [score_run(run_of(small_task(5), ["yes"] * 5))], identity)
    with pytest.raises(DataError, match="differ in their questions"):
        compare_folders(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        compare_folders(tmp_path / "a", tmp_path)
