from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_eval_goes_through_the_suite_and_two_evaluations_are_compared(mmfuse, finished, tmp_path):
    for name in ("a", "b"):
        ran = mmfuse("eval", "--ckpt", finished, "--tasks", "handwriting", "--limit", 4, "--out", tmp_path / name)
        assert ran.code == 0, ran.err
        assert "| handwriting_pope | accuracy |" in ran.out and "handwriting_count: 4/4" in ran.err
    results = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("a", "b")]
    assert results[0] == results[1] and len(results[0]) == 5
    ran = mmfuse("compare-eval", tmp_path / "a", tmp_path / "b")
    assert ran.code == 0 and "handwriting_retrieval" in ran.out
    ran = mmfuse("eval", "--ckpt", finished, "--tasks", "handwriting_pop", "--out", tmp_path / "c")
    assert ran.code == 2 and "did you mean 'handwriting_pope'" in ran.err
