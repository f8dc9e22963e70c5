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


@pytest.mark.slow
def test_diagnose_writes_numbers_and_a_picture_of_each_diagnostic(mmfuse, finished, tmp_path):
    ran = mmfuse("diagnose", "--ckpt", finished, "--tasks", "handwriting_pope,handwriting_caption", "--samples", 2,
                 "--limit", 4, "--out", tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err
    assert "what the image adds to log p" in ran.out
    found = json.loads((tmp_path / "diagnostics.json").read_text())["tasks"]
    assert set(found["handwriting_pope"]) >= {"ablation", "dominance", "sinks", "heads", "exits", "yes"}
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"ablation", "dominance", "heads", "exits", "position"}


def test_task_scores_are_logged_at_validations_of_a_fit(monkeypatch):
    from types import SimpleNamespace

    from mmfuse.errors import ConfigError
    from mmfuse.training.task_scores import TaskScores

    callback = TaskScores(["handwriting_count"], limit=3)
    assert [len(task.items) for task in callback.tasks] == [3]
    monkeypatch.setattr(callback, "_scores", lambda module: {"eval/handwriting_count": 0.5})
    logged = []
    module = SimpleNamespace(log_dict=lambda scores, **_: logged.append(scores))
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True, state=SimpleNamespace(fn="fit"),
                              strategy=SimpleNamespace(broadcast=lambda scores: scores))  # fmt: skip
    callback.on_validation_epoch_end(trainer, module)
    assert float(logged[0]["eval/handwriting_count"]) == 0.5
    trainer.state.fn = "validate"
    callback.on_validation_epoch_end(trainer, module)
    assert len(logged) == 1
    with pytest.raises(ConfigError, match="did you mean"):
        TaskScores(["handwriting_coun"])


@pytest.mark.slow
def test_task_scores_of_a_model_are_those_of_mmfuse_eval(mmfuse, finished, tmp_path):
    from types import SimpleNamespace

    from mmfuse.training.inference import load_model
    from mmfuse.training.task_scores import TaskScores

    network, processor = load_model(finished / "model")
    found = TaskScores(["handwriting_count"], limit=4)._scores(SimpleNamespace(network=network, processor=processor))
    mmfuse("eval", "--ckpt", finished, "--tasks", "handwriting_count", "--limit", 4, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["tasks"]["handwriting_count"]
    assert found["eval/handwriting_count"] == results["metrics"]["exact_match"]["value"]
    assert found["eval/handwriting_count/unparsed"] == results["unparsed_rate"]
