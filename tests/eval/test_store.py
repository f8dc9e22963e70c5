from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.store import PredictionStore, read_records

IDENTITY = {"weights": "a" * 64, "task": "t"}


def record(name, text="yes"):
    return {"id": name, "prediction": text, "key": "k"}


def test_answers_are_found_again_and_end_in_the_order_of_the_task(tmp_path):
    first, second = (PredictionStore(tmp_path, "t", IDENTITY, rank) for rank in (0, 1))
    first.claim()
    first.append([record("b"), record("a")])
    second.append([record("c", "nö\n")])
    again = PredictionStore(tmp_path, "t", IDENTITY)
    assert set(again.done) == {"a", "b", "c"}
    assert [r["id"] for r in again.finish(["c", "a", "b"])] == ["c", "a", "b"]
    assert [r["id"] for r in read_records(again.final)] == ["c", "a", "b"]
    assert read_records(again.final)[0]["prediction"] == "nö\n"
    assert sorted(path.name for path in again.final.parent.iterdir()) == ["t.jsonl", "t.manifest.json"]


@given(cut=st.integers(0, 200), whole=st.integers(0, 3))
def test_a_torn_line_is_left_out_and_what_follows_is_kept(tmp_path_factory, cut, whole):
    tmp_path = tmp_path_factory.mktemp("torn")
    store = PredictionStore(tmp_path, "t", IDENTITY)
    store.claim()
    store.append([record(f"r{number}") for number in range(whole + 1)])
    part = tmp_path / "predictions" / "t.part-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    torn = lines[-1][: cut % len(lines[-1])]
    part.write_bytes(b"".join(lines[:-1]) + torn)
    again = PredictionStore(tmp_path, "t", IDENTITY)
    assert set(again.done) == {f"r{number}" for number in range(whole)}
    again.append([record("new")])
    expected = {f"r{number}" for number in range(whole)} | {"new"}
    if torn == lines[-1][:-1]:
        expected.add(f"r{whole}")  # only its newline was lost, and is there now
    assert set(PredictionStore(tmp_path, "t", IDENTITY).done) == expected


def test_of_two_answers_to_one_item_the_first_is_kept(tmp_path):
    for rank, text in ((0, "first"), (1, "second")):
        store = PredictionStore(tmp_path, "t", IDENTITY, rank)
        store.claim()
        store.append([record("a", text)])
    assert PredictionStore(tmp_path, "t", IDENTITY).done["a"]["prediction"] == "first"


def test_answers_of_another_model_are_refused_by_name(tmp_path):
    PredictionStore(tmp_path, "t", IDENTITY).claim()
    with pytest.raises(ConfigError, match=r"weights \(aaaaaaaaaaaa… → b\)"):
        PredictionStore(tmp_path, "t", {**IDENTITY, "weights": "b"})
    with pytest.raises(ConfigError, match=r"fusion \(none → mma\)"):
        PredictionStore(tmp_path, "t", {**IDENTITY, "fusion": "mma"})
    PredictionStore(tmp_path, "other", {**IDENTITY, "weights": "b"})
    PredictionStore.remove(tmp_path, "t")
    PredictionStore(tmp_path, "t", {**IDENTITY, "weights": "b"})


def test_damage_that_no_kill_can_do_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record("a")) + "\nnonsense\n")
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: unreadable JSON"):
        read_records(path)
    path.write_text('{"prediction": "a"}\n')
    with pytest.raises(DataError, match="line 1: expected an object with an id"):
        read_records(path)


def test_a_missing_answer_is_named(tmp_path):
    store = PredictionStore(tmp_path, "t", IDENTITY)
    store.claim()
    store.append([record("a")])
    with pytest.raises(DataError, match="no answer to 'b'"):
        store.finish(["a", "b"])


def test_answers_without_manifest_are_refused(tmp_path):
    store = PredictionStore(tmp_path, "t", IDENTITY)
    store.append([record("a")])
    with pytest.raises(ConfigError, match="--fresh discards them"):
        PredictionStore(tmp_path, "t", IDENTITY)
