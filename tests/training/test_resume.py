"""A run that was cut off at any step goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfuse.training.checkpoints import read_checkpoint
from mmfuse.training.module import MultimodalModule

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]

#: Columns that depend on the machine's mood.
SPEED = ("tokens_per_second/", "train/seconds")

#: More variety than one setting at a time: a change for each name.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average of weights": {"model": {"ema_decay": 0.5}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "workers": {"data": {"init_args": {"num_workers": 1}}},
}


class Crash(Exception):
    """The machine fails."""


def comparable(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith(SPEED)} for row in rows]


def last_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(run / "checkpoints" / "last.ckpt", map_location="cpu")
    return state


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = MultimodalModule.training_step

    def broken(self: MultimodalModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Crash
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MultimodalModule, "training_step", broken)


def same_run(one: Path, other: Path, read_rows: ReadRows) -> None:
    """Both runs made the same steps, have the same metrics but for throughput, and the same weights."""
    rows = [comparable(read_rows(run)) for run in (one, other)]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert rows[0] == rows[1]
    states = [last_state(run) for run in (one, other)]
    assert states[0]["global_step"] == states[1]["global_step"] == 8
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("variant", "crash"), [("plain", 3), ("plain", 7), ("average of weights", 5)])
def test_run_goes_on_after_a_crash(
    variant: str,
    crash: int,
    mmfuse: Command,
    write_config: WriteConfig,
    tmp_path: Path,
    read_rows: ReadRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare_with_uninterrupted(variant, crash, mmfuse, write_config, tmp_path, read_rows, monkeypatch)


#: Every variant once, and every step once.
SAMPLED = {(name, crash) for name, crash in zip(VARIANTS, (2, 4, 5, 6), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "crash"),
    [
        pytest.param(name, crash, marks=() if (name, crash) in SAMPLED else pytest.mark.exhaustive)
        for name in VARIANTS
        for crash in (2, 4, 5, 6)
    ],
)
def test_run_goes_on_after_a_crash_anywhere(
    variant: str,
    crash: int,
    mmfuse: Command,
    write_config: WriteConfig,
    tmp_path: Path,
    read_rows: ReadRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare_with_uninterrupted(variant, crash, mmfuse, write_config, tmp_path, read_rows, monkeypatch)


def compare_with_uninterrupted(
    variant: str,
    crash: int,
    mmfuse: Command,
    write_config: WriteConfig,
    tmp_path: Path,
    read_rows: ReadRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config({**VARIANTS[variant], "checkpoint_every": 2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert mmfuse("fit", "--config", config, "--out", whole).code == 0
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        with pytest.raises(Crash):
            mmfuse("fit", "--config", config, "--out", cut)
    assert not (cut / "results.json").exists()
    assert last_state(cut)["global_step"] == crash // 2 * 2
    assert mmfuse("fit", "--config", config, "--out", cut, "--ckpt_path", "last").code == 0
    same_run(whole, cut, read_rows)
    for name in ("results.json", "report.html", "predictions.jsonl"):
        assert (cut / name).exists()
    assert (cut / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def test_best_checkpoint_survives_a_crash(
    mmfuse: Command,
    write_config: WriteConfig,
    tmp_path: Path,
    read_rows: ReadRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A later and worse validation does not replace it, even if the run's folder was moved meanwhile."""

    def worse_and_worse(self: MultimodalModule) -> None:
        self.log_dict({"val/loss": 1.0, "val/exact_match": 1 / self.global_step}, logger=False)

    monkeypatch.setattr(MultimodalModule, "on_validation_epoch_end", worse_and_worse)
    words = ["fit", "--config", write_config({"checkpoint_every": 2}), "--out"]
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(Crash):
            mmfuse(*words, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "run")
    assert mmfuse(*words, tmp_path / "run", "--ckpt_path", "last").code == 0
    assert [row.get("val/exact_match") for row in read_rows(tmp_path / "run")] == [
        *[None] * 3,
        0.25,
        *[None] * 3,
        0.125,
    ]
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt", map_location="cpu")
    assert best["global_step"] == 4
    held = ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == held


def test_finished_run_that_is_resumed_makes_no_step(
    mmfuse: Command, finished: Path, tmp_path: Path, read_rows: ReadRows, read_json: Callable[[Path], Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    ran = mmfuse("fit", "--config", finished / "config.yaml", "--out", run, "--ckpt_path", "last")
    assert ran.code == 0
    assert read_rows(run) == read_rows(finished)
    old, new = read_json(finished / "results.json"), read_json(run / "results.json")
    assert new == old


# The real thing


def start(words: Sequence[str | Path]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmfuse", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def steps_in(run: Path) -> int:
    path = run / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


@pytest.mark.slow
def test_kill_9_twice_and_resume(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows, settings: dict[str, Any]
) -> None:
    stages = [{**settings["stages"][0], "steps": 40}, {**settings["stages"][1], "steps": 80}]
    changes = {
        "stages": stages,
        "checkpoint_every": 7,
        "model": {"ema_decay": 0.9},
        "trainer": {"val_check_interval": 50},
    }
    config = write_config(changes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert mmfuse("fit", "--config", config, "--out", whole).code == 0
    for number, goal in enumerate((20, 75)):
        process = start(["fit", "--config", config, "--out", cut, *(["--ckpt_path", "last"] if number else [])])
        deadline = time.monotonic() + 120
        while steps_in(cut) < goal:
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        saved = last_state(cut)["global_step"]
        assert saved % 7 == 0 and 0 < saved <= steps_in(cut) < 120
    process = start(["fit", "--config", config, "--out", cut, "--ckpt_path", "last"])
    assert process.communicate(timeout=180)[1] is not None and process.returncode == 0
    rows = comparable(read_rows(cut))
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows == comparable(read_rows(whole))
    assert (cut / "results.json").exists() and (cut / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("cut")] == ["cut"], "resumed in place"


@pytest.mark.slow
def test_resuming_without_a_checkpoint_exits_with_2(write_config: WriteConfig, tmp_path: Path) -> None:
    process = start(["fit", "--config", write_config(), "--out", tmp_path / "run", "--ckpt_path", "last"])
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert error.startswith("mmfuse: error: --ckpt_path last: no checkpoint at") and error.count("\n") == 1


@pytest.mark.slow
def test_interrupt_exits_with_130_and_can_be_resumed(
    write_config: WriteConfig, tmp_path: Path, settings: dict[str, Any], mmfuse: Command, read_rows: ReadRows
) -> None:
    stages = [{**settings["stages"][1], "steps": 300}]
    words = ["fit", "--config", write_config({"stages": stages}), "--out", tmp_path / "run"]
    process = start(words)
    deadline = time.monotonic() + 120
    while steps_in(tmp_path / "run") < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (tmp_path / "run" / "results.json").exists()
    assert last_state(tmp_path / "run")["global_step"] >= 8
    assert mmfuse(*words, "--ckpt_path", "last").code == 0
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(1, 301))
