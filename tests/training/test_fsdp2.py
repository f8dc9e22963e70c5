"""FSDP 2 on CPUs over gloo: the losses of DDP, and checkpoints that go on on any number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfuse.training.checkpoints import damage, read_checkpoint

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]

FSDP2 = ["--trainer.strategy", "fsdp2", "--trainer.devices"]
#: Accumulation; other numbers of validation samples on the two ranks.
CHANGES: dict[str, Any] = {
    "trainer": {"accumulate_grad_batches": 2},
    "data": {"init_args": {"batch_size": 4, "eval_batch_size": 3, "scenes": {"val": 27}}},
    "checkpoint_every": 2,
}


def numbers(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Losses by step."""
    names = ("train/loss", "train/supervised_tokens", "val/loss")
    return {name: [row[name] for row in rows if name in row] for name in names}


def same(run: Path, other: Path, read_rows: ReadRows, **tolerance: float) -> None:
    found, expected = numbers(read_rows(run)), numbers(read_rows(other))
    assert len(expected["train/loss"]) == 8 and len(expected["val/loss"]) >= 2
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, **tolerance), name


def start(words: Sequence[str | Path]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mmfuse", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr


def test_one_rank_trains_and_resumes(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, finished: Path, read_rows: ReadRows
) -> None:
    """From a sharded checkpoint, and from the file that a run on whole weights has left."""
    words = ["fit", "--config", write_config()]
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    assert mmfuse(*words, "--out", sharded, *FSDP2, "1", "--trainer.max_steps", "4").code == 0
    assert mmfuse(*words, "--out", whole, "--trainer.max_steps", "4").code == 0
    last = sharded / "checkpoints" / "last.ckpt"
    assert last.is_dir() and damage(last) is None and read_checkpoint(last)["global_step"] == 4
    ran = mmfuse(*words, "--out", sharded, "--ckpt_path", "last")
    assert ran.code == 2 and "last.ckpt is sharded: go on with --trainer.strategy fsdp2" in ran.err
    for run in (sharded, whole):
        assert mmfuse(*words, "--out", run, "--ckpt_path", "last", *FSDP2, "1").code == 0
        same(run, finished, read_rows, rel=1e-4)
        weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, finished))
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=2e-3, msg=name)
    ran = mmfuse("test", "--config", write_config(), "--out", sharded)
    assert ran.code == 0 and "held-out questions" in ran.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fit", "--trainer.strategy", "fsdp"], "trainer.strategy fsdp writes its checkpoints in place"),
        (["fit", *FSDP2, "1", "--model.ema_decay", "0.9"], "model.ema_decay needs whole weights on every rank"),
        (["test", *FSDP2, "1"], "test generates on whole weights"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    words: list[str], says: str, mmfuse: Command, write_config: WriteConfig, finished: Path, tmp_path: Path
) -> None:
    out = finished if words[0] == "test" else tmp_path / "run"
    ran = mmfuse(words[0], "--config", write_config(), "--out", out, *words[1:])
    assert ran.code == 2 and says in ran.err, ran.err


@pytest.mark.slow
def test_two_ranks_train_as_under_ddp_and_resume_exactly(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows
) -> None:
    config = write_config(CHANGES)
    ddp, whole, cut, single = (tmp_path / name for name in ("ddp", "whole", "cut", "single"))
    start(["fit", "--config", config, "--out", ddp, "--trainer.strategy", "ddp", "--trainer.devices", "2"])
    start(["fit", "--config", config, "--out", whole, *FSDP2, "2"])
    same(whole, ddp, read_rows, rel=1e-4)
    start(["fit", "--config", config, "--out", cut, *FSDP2, "2", "--trainer.max_steps", "5"])
    shutil.copytree(cut, single, symlinks=True)
    start(["fit", "--config", config, "--out", cut, *FSDP2, "2", "--ckpt_path", "last"])
    same(cut, whole, read_rows, rel=0, abs=0)
    words = [
        "--trainer.accumulate_grad_batches",
        "4",
        "--trainer.val_check_interval",
        "8",
        "--ckpt_path",
        "last",
        *FSDP2,
        "1",
    ]
    assert mmfuse("fit", "--config", config, "--out", single, *words).code == 0
    same(single, whole, read_rows, rel=1e-4)
