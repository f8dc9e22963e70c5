"""Streams in a fit: packed rows, exact resume whatever was fetched ahead, and other numbers of ranks and workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfuse.data import encode_sample
from mmfuse.data.packing import pack
from mmfuse.training.checkpoints import read_checkpoint
from mmfuse.training.cli import parse_and_build
from mmfuse.training.module import MultimodalModule
from mmfuse.training.streaming import SAMPLES, read_sample_log

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]

#: Packed rows, changed images, accumulation: whatever makes a state hard.
PACKED: dict[str, Any] = {
    "data": {
        "init_args": {
            "batch_size": 2,
            "stream": {
                "pack_to": 96,
                "window": 12,
                "lanes": 8,
                "augment": {"crop": 0.8, "brightness": 0.2, "contrast": 0.2},
            },
        }
    },
    "trainer": {"accumulate_grad_batches": 4, "val_check_interval": 16},
    "log_samples": True,
    "checkpoint_every": 2,
}
DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accumulate_grad_batches", "2"]


class Crash(Exception):
    """The machine fails."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = MultimodalModule.training_step

    def broken(self: MultimodalModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step and batch_idx % 4 == 2:
            raise Crash
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MultimodalModule, "training_step", broken)


def losses(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["train/loss"] for row in rows]


def data_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(run / "checkpoints" / "last.ckpt", map_location="cpu")["HandwritingData"]
    return state


def start(words: Sequence[str | Path]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmfuse", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_packed_run_goes_on_after_a_crash_with_other_workers(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a step, in the second stage; without workers before, with two after."""
    config = write_config(PACKED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert mmfuse("fit", "--config", config, "--out", whole).code == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(Crash):
            mmfuse("fit", "--config", config, "--out", cut)
    assert data_state(cut)["steps"] == 4
    words = ["--ckpt_path", "last", "--data.init_args.num_workers", "2"]
    assert mmfuse("fit", "--config", config, "--out", cut, *words).code == 0
    log = read_sample_log(whole)
    assert list(log) == list(range(1, 9)) and all(len(batches) == 4 for batches in log.values())
    assert sum(len(ids) for batches in log.values() for ids in batches) > 3 * 2 * 8 * 4 / 2, "rows hold several samples"
    assert {one.split("/")[0] for batches in list(log.values())[:3] for ids in batches for one in ids} == {"align"}
    assert (cut / SAMPLES).read_text() == (whole / SAMPLES).read_text()
    assert losses(read_rows(cut)) == losses(read_rows(whole))
    assert data_state(cut) == data_state(whole)
    assert len(json.dumps(data_state(whole))) < 1000


@pytest.mark.slow
def test_changed_data_are_refused_by_name(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, finished: Path
) -> None:
    config = write_config()
    words = ["fit", "--config", config, "--out", tmp_path / "run"]
    assert mmfuse(*words, "--trainer.max_steps", "3").code == 0
    ran = mmfuse(*words, "--ckpt_path", "last", "--data.init_args.batch_size", "4")
    assert ran.code == 2 and "samples per optimizer step was 8 and is now 4" in ran.err
    ran = mmfuse(*words, "--ckpt_path", "last", "--data.init_args.scenes.instruct", "65")
    assert ran.code == 2 and "the data of align was" not in ran.err and "the data of instruct was" in ran.err
    words += [
        "--ckpt_path",
        "last",
        "--data.init_args.batch_size",
        "4",
        "--data.init_args.stream.allow_changes",
        "true",
    ]
    assert mmfuse(*words).code == 0


def test_more_ranks_and_readers_than_lanes_are_refused(mmfuse: Command, write_config: WriteConfig) -> None:
    ran = mmfuse("fit", "--config", write_config(), "--data.init_args.num_workers", "5")
    assert ran.code == 2 and "stream.lanes is 48, which 1 ranks with 5 readers each cannot share evenly" in ran.err


@pytest.mark.parametrize("fusion", ["causal", "mma", "naavit", "saisa", "cross_attention"])
def test_packed_and_unpacked_have_one_loss_and_one_gradient(fusion: str, write_config: WriteConfig) -> None:
    """The samples of a row do not see each other: the loss and all gradients are those of samples apart."""
    cli = parse_and_build(["--config", str(write_config()), "--model.network.fusion", fusion], run=False)
    data, module = cli.datamodule, cli.model.double()
    data.prepare_data()
    data.setup("fit")
    samples = [data.sources[name][number] for number in range(5) for name in ("instruct", "align")]
    encoded = [encode_sample(sample, module.processor.encoder) for sample in samples]
    rows = pack([len(one) for one in encoded], 150)
    assert 2 <= len(rows) <= 7
    found = []
    for batch in (
        module.processor.collate(encoded),
        module.processor.collate_rows([[encoded[one] for one in row] for row in rows]),
    ):
        module.zero_grad()
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        output = module.network(**{**batch, "pixel_values": batch["pixel_values"].double()})
        (output.loss * output.supervised).backward()
        gradients = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
        found.append((output.loss.detach(), output.supervised, gradients))
    (loss, count, gradients), (packed_loss, packed_count, packed_gradients) = found
    assert int(count) == int(packed_count) > 100
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == packed_gradients.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.slow
def test_one_rank_two_ranks_and_back(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows
) -> None:
    """1 -> 2 -> 1 ranks, 0 -> 2 -> 4 workers: the same samples in every step, in the same rows."""
    config = write_config(PACKED)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert mmfuse("fit", "--config", config, "--out", whole).code == 0
    words = ["fit", "--config", config, "--out", moved]
    assert mmfuse(*words, "--trainer.max_steps", "2").code == 0
    two = start([*words, "--ckpt_path", "last", *DDP, "--data.init_args.num_workers", "2", "--trainer.max_steps", "6"])
    assert two.wait(240) == 0, two.communicate()[1]
    assert data_state(moved)["steps"] == 6
    assert mmfuse(*words, "--ckpt_path", "last", "--data.init_args.num_workers", "4").code == 0
    assert (moved / SAMPLES).read_text() == (whole / SAMPLES).read_text()
    assert losses(read_rows(moved)) == pytest.approx(losses(read_rows(whole)), rel=1e-4)
    assert data_state(moved) == data_state(whole)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_at_any_moment(
    ranks: int, mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows, settings: Any
) -> None:
    """Twice, wherever it hits; samples, rows, images and losses are those of the uninterrupted run."""
    stages = [{**settings["stages"][0], "steps": 20}, {**settings["stages"][1], "steps": 60}]
    config = write_config({**PACKED, "stages": stages, "checkpoint_every": 3})
    more = DDP if ranks == 2 else ["--data.init_args.num_workers", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(["fit", "--config", config, "--out", whole, *more])
    assert process.wait(280) == 0, process.communicate()[1]
    for number, goal in enumerate((10, 45)):
        words = ["fit", "--config", config, "--out", cut, *more, *(["--ckpt_path", "last"] if number else [])]
        process = start(words)
        deadline = time.monotonic() + 200
        while not (cut / SAMPLES).exists() or (cut / SAMPLES).read_text().count("\n") < goal:
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(["fit", "--config", config, "--out", cut, *more, "--ckpt_path", "last"])
    assert process.wait(280) == 0, process.communicate()[1]
    assert (cut / SAMPLES).read_text() == (whole / SAMPLES).read_text()
    assert losses(read_rows(cut)) == losses(read_rows(whole))
