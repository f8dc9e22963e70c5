from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmfuse.errors import ConfigError, DataError, RunError
from mmfuse.eval.engine import Likelihoods
from mmfuse.eval.ranks import Ranks
from mmfuse.eval.runner import RunSettings, ranked, run_task
from mmfuse.eval.store import read_records
from mmfuse.eval.tasks.items import MediaFile, Request
from mmfuse.fusion import FUSIONS

SMALL = RunSettings(batch_tokens=120)


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()}


class Counting:
    """An engine that counts the items it is asked, and can be told to stop the process' work."""

    def __init__(self, engine, stop_after=None):
        self._engine, self.asked, self._stop_after = engine, [], stop_after

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def generate(self, items, media, max_new_tokens):
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            raise KeyboardInterrupt
        self.asked += [item.id for item in items]
        return self._engine.generate(items, media, max_new_tokens)


def test_a_finished_task_is_not_asked_again_and_an_interrupted_one_goes_on(engine, small_task, tmp_path):
    whole = run_task(engine, small_task(), tmp_path / "whole", SMALL)
    assert [record["id"] for record in whole.records] == [item.id for item in small_task().items]
    assert whole.asked == 12 and not whole.errors
    cut = Counting(engine, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        run_task(cut, small_task(), tmp_path / "cut", SMALL)
    rest = Counting(engine)
    again = run_task(rest, small_task(), tmp_path / "cut", SMALL)
    assert set(cut.asked).isdisjoint(rest.asked) and len(cut.asked + rest.asked) == 12
    assert again.records == whole.records
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    idle = Counting(engine)
    assert run_task(idle, small_task(), tmp_path / "cut", SMALL).records == whole.records and not idle.asked


def test_a_batch_of_which_a_part_was_stored_is_asked_whole_and_keeps_what_was_stored(engine, small_task, tmp_path):
    run_task(engine, small_task(), tmp_path / "whole", SMALL)
    run_task(engine, small_task(), tmp_path / "torn", SMALL)
    folder = tmp_path / "torn" / "predictions"
    data = (folder / "small.jsonl").read_bytes()
    (folder / "small.jsonl").unlink()
    (folder / "small.part-0.jsonl").write_bytes(data[: int(len(data) * 0.6)])
    run_task(engine, small_task(), tmp_path / "torn", SMALL)
    assert files(tmp_path / "torn") == files(tmp_path / "whole")


def test_another_model_question_or_medium_is_refused_by_name(engine, make_engine, small_task, png, tmp_path):
    run_task(engine, small_task(), tmp_path)
    with pytest.raises(ConfigError, match=r"changed: config .*fusion \(mma → causal\)"):
        run_task(make_engine("causal"), small_task(), tmp_path)
    with pytest.raises(ConfigError, match="changed: questions"):
        run_task(engine, small_task(11), tmp_path)
    with pytest.raises(ConfigError, match="changed: request"):
        run_task(engine, replace(small_task(), max_new_tokens=6), tmp_path)
    task = small_task()
    other = replace(task.items[3], media=(MediaFile("image", "noise-3.png", lambda: png(99), "png"),))
    swapped = replace(task, items=(*task.items[:3], other, *task.items[4:]))
    with pytest.raises(ConfigError, match=r"the media of q3 have changed .*noise-3\.png"):
        run_task(engine, swapped, tmp_path)
    assert run_task(engine, swapped, tmp_path, RunSettings(fresh=True)).asked == 12


def test_ranking_takes_the_likeliest_option_and_says_by_how_much(engine, small_task, decoded, tmp_path):
    task = small_task(5, Request.RANK)
    records = run_task(engine, task, tmp_path).records
    for record, found in zip(records, engine.likelihoods(task.items, decoded(task.items)), strict=True):
        best = int(np.argmax(found.logprobs))
        assert record["prediction"] == task.items[0].options[best]
        assert record["logprobs"] == pytest.approx(found.logprobs, abs=1e-4)


@pytest.mark.parametrize("per_token, winner", [(False, "3"), (True, "35 71")])
def test_options_are_compared_by_sum_or_by_mean(small_task, per_token, winner):
    (item,) = small_task(1, Request.RANK).items
    found = Likelihoods((-3.0, -4.0, -9.0), (2, 6, 2))
    assert ranked(item, found, per_token=per_token)["prediction"] == winner
    assert ranked(item, Likelihoods((-1.0, -1.0, -1.0), (2, 2, 2)), per_token=False)["prediction"] == "3"
    labelled = replace(item, labels=("A", "B", "C"))
    assert ranked(labelled, found, per_token=True)["prediction"] == "B"
    with pytest.raises(RunError, match="NaN"):
        ranked(item, Likelihoods((float("nan"), -1.0, -1.0), (2, 2, 2)), per_token=False)


def test_too_large_batches_are_halved_and_give_the_same_answers(engine, small_task, tmp_path):
    class Cramped(Counting):
        def generate(self, items, media, max_new_tokens):
            if len(items) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().generate(items, media, max_new_tokens)

    cramped = run_task(Cramped(engine), small_task(), tmp_path / "a", RunSettings(batch_size=12))
    free = run_task(engine, small_task(), tmp_path / "b", RunSettings(batch_size=3))
    assert cramped.halved == 3
    assert [r["prediction"] for r in cramped.records] == [r["prediction"] for r in free.records]


def test_what_the_model_cannot_take_is_named_and_the_rest_of_its_batch_is_answered(engine, small_task, tmp_path):
    task = small_task(4)
    sound = MediaFile("image", "gone.png", lambda: (_ for _ in ()).throw(FileNotFoundError("gone.png")), "png")
    items = (*task.items[:2], replace(task.items[2], media=(sound,)), task.items[3])
    run = run_task(engine, replace(task, items=items), tmp_path)
    assert [record["id"] for record in run.errors] == ["q2"]
    assert "gone.png" in run.errors[0]["error"] and run.errors[0]["prediction"] == ""
    whole = run_task(engine, task, tmp_path / "whole")
    assert [r["prediction"] for r in run.records if r["id"] != "q2"] == [
        r["prediction"] for r in whole.records if r["id"] != "q2"
    ]
    with pytest.raises(DataError, match=r"task small, q2: read: .*gone\.png"):
        run_task(engine, replace(task, items=items), tmp_path / "abort", RunSettings(on_error="abort"))


def _run_rank(rank, world, port, engine, task, out, settings):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks.from_environment()
    run_task(engine, task, out, settings, ranks=ranks)
    ranks.close()


def forked(*calls):
    """Run each call in a process of its own and return their exit codes."""
    children = []
    for call in calls:
        child = os.fork()
        if not child:
            code = 1
            try:
                call()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port():
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("request_kind", list(Request))
@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_two_ranks_write_the_bytes_of_one(make_engine, small_task, tmp_path, fusion, request_kind):
    engine, task = make_engine(fusion), small_task(9, request_kind)
    engine.identity()
    run_task(engine, task, tmp_path / "one", SMALL)
    port = free_port()
    calls = [lambda rank=rank: _run_rank(rank, 2, port, engine, task, tmp_path / "two", SMALL) for rank in range(2)]
    assert forked(*calls) == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_likelihoods_do_not_depend_on_the_batch(make_engine, small_task, tmp_path, fusion):
    engine = make_engine(fusion)
    for request in Request:
        task = small_task(16, request)
        runs = {
            "alone": RunSettings(batch_size=1),
            "eight": RunSettings(batch_size=8),
            "sorted": RunSettings(batch_tokens=10_000),
        }
        found = {name: run_task(engine, task, tmp_path / request / name, own).records for name, own in runs.items()}
        for name in ("eight", "sorted"):
            for one, other in zip(found["alone"], found[name], strict=True):
                if request is Request.RANK:
                    assert other["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
                near_tie = min(one["margin"], other["margin"]) < 1e-4
                assert near_tie or other["prediction"] == one["prediction"]
                assert (
                    near_tie or request is Request.RANK or other["logprob"] == pytest.approx(one["logprob"], abs=1e-4)
                )


@pytest.mark.slow
def test_kills_at_random_points_leave_the_bytes_of_an_uninterrupted_run(engine, small_task, tmp_path):
    task = small_task(40)
    engine.identity()
    began = time.monotonic()
    run_task(engine, task, tmp_path / "whole", SMALL)
    took = time.monotonic() - began
    rng = np.random.default_rng(0)
    killed = asked = 0
    log = tmp_path / "asked.jsonl"

    class Logging(Counting):
        def generate(self, items, media, max_new_tokens):
            with log.open("a") as file:
                file.write(json.dumps([item.id for item in items]) + "\n")
            return super().generate(items, media, max_new_tokens)

    while killed < 6:
        child = os.fork()
        if not child:
            code = 1
            try:
                run_task(Logging(engine), task, tmp_path / "killed", SMALL)
                code = 0
            finally:
                os._exit(code)
        time.sleep(took * rng.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed += code == -signal.SIGKILL
        if code == 0:
            break
    run_task(Logging(engine), task, tmp_path / "killed", SMALL)
    assert killed >= 2
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    batches = [json.loads(line) for line in log.read_text().splitlines()]
    asked = sum(map(len, batches))
    assert asked <= len(task.items) + killed * max(map(len, batches)), "work was lost that had been stored"
    assert len(read_records(tmp_path / "killed" / "predictions" / "small.jsonl")) == 40
