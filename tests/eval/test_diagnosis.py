from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmfuse.analysis.diagnostic_plots import PICTURES, plot_diagnostics
from mmfuse.errors import DataError
from mmfuse.eval.biases import of_answers
from mmfuse.eval.diagnosis import ablation, blank, diagnose, probes, right_answer, shuffled
from mmfuse.eval.engine import NetworkEngine
from mmfuse.eval.tasks.items import MediaFile, Request


def blinded(engine):
    """The same model with images that are nothing to it."""
    import copy

    model = copy.deepcopy(engine.model)
    for connector in model.connectors.values():
        for parameter in connector.parameters():
            parameter.data.zero_()
    return NetworkEngine(model, engine.processor)


def test_what_an_image_adds_is_the_difference_of_two_losses(engine, small_task):
    found, _ = probes(small_task(3), 3)
    samples = ablation(engine, found)["blank"]["samples"]
    for probe in found:
        values = []
        for media in (probe.media, blank(probe.media)):
            batch = engine.processor([*probe.item.messages, {"role": "assistant", "content": "yes"}], media)
            with torch.inference_mode():
                output = engine.model(**batch)
            values.append(-float(output.loss * output.supervised))
        assert samples[probe.item.id] == pytest.approx(values[0] - values[1], abs=1e-4)
        assert abs(samples[probe.item.id]) > 1e-3


def test_a_blind_model_loses_nothing_without_its_images(engine, small_task):
    found = diagnose(blinded(engine), small_task(4), 4)
    for name in ("blank", "shuffle"):
        assert set(found["ablation"][name]["samples"].values()) == {0.0}
    assert max(map(max, found["heads"]["vhd"])) == 0


def test_diagnostics_hang_together_and_are_plain_json(engine, small_task):
    found = diagnose(engine, small_task(5), 4)
    json.dumps(found, allow_nan=False)
    assert found["samples"] == 4 and set(found["ablation"]) == {"blank", "shuffle"}
    depth = engine.model.config.text_config.num_hidden_layers
    assert found["exits"]["layers"] == list(range(depth + 1)) and found["exits"]["mean"][-1] == 0
    assert any(found["exits"]["mean"][:-1])
    for own in (found["dominance"]["with_first_token"], found["dominance"]["without_first_token"]):
        q = own["token_share"]
        for mdi, aei in zip(own["mdi"], own["aei"]["text"], strict=True):
            assert aei == pytest.approx(mdi / (1 + q * (mdi - 1)), rel=0.05)
        assert sum(part["samples"] for part in own["strata"].values()) == 4


def test_images_are_swapped_between_items_and_broken_ones_named(small_task):
    task = small_task(4)
    gone = MediaFile("image", "gone.png", lambda: b"nothing", "png")
    broken = replace(task, items=(*task.items[:3], replace(task.items[3], media=(gone,))))
    found, lost = probes(broken, 4)
    assert lost == ["q3"] and len(found) == 3
    swapped = shuffled(found)
    assert [probe.media for probe in swapped] == [found[1].media, found[2].media, found[0].media]
    assert shuffled(found[:1]) == [None]
    with pytest.raises(DataError, match="no item has media"):
        probes(replace(task, items=broken.items[3:]), 1)


def test_the_right_answer_is_in_the_words_of_the_model(small_task):
    (item,) = small_task(1, Request.RANK).items
    assert right_answer(item) == "yes"
    assert right_answer(replace(item, labels=("A", "B", "C"), target="B")) == "35 71"
    assert right_answer(replace(item, target=["one", "two"])) == "one"


def test_every_diagnostic_has_a_picture(engine, small_task, tmp_path):
    task = small_task(4)
    found = diagnose(engine, task, 3)
    rows = [{"id": item.id, "prediction": "yes", "target": "yes", "category": item.category, "cluster": item.id}
            for item in task.items]  # fmt: skip
    letters = {"n": 2, "letters": {"A": {"said": 1.0, "right": 0.5, "recall": 1.0}}, "recall_std": 0.0, "other": 0.0}
    position = {"n": 1, "bins": [{"mentions": 2, "invented": 1, "rate": 0.5}] * 5, "survival": []}
    tasks = {"a": found | of_answers(task, rows) | {"letters": letters, "position": position}}
    written = plot_diagnostics(tasks, tmp_path)
    assert [path.stem for path in written] == list(PICTURES) and all(path.stat().st_size > 2000 for path in written)
