"""Two processes train what one process with twice the batch trains. On CPUs, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfuse.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow

Command = Callable[..., Any]
WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]

#: Columns that depend on the machine's mood.
SPEED = ("tokens_per_second/", "train/seconds")

DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def run(words: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmfuse", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = read_checkpoint(folder / "checkpoints" / f"{name}.ckpt", map_location="cpu")[
        "state_dict"
    ]
    return held


def same_numbers(one: Path, other: Path, read_rows: ReadRows) -> None:
    """The same metrics but for throughput and rounding, and the same weights."""
    rows, others = read_rows(one), read_rows(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, 9))
    for row, expected in zip(others, rows, strict=True):
        names = {name for name in expected if not name.startswith(SPEED)}
        assert names == {name for name in row if not name.startswith(SPEED)}
        assert {name: row[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-3)
        assert row["train/supervised_tokens"] == expected["train/supervised_tokens"]
    for name, value in weights(one).items():
        # Adam divides small gradients by their size, so that rounding in them is no longer small.
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-2, atol=2e-3, msg=name)


def test_two_ranks_train_like_one_with_twice_the_batch(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows, read_json: Callable[[Path], Any]
) -> None:
    config = write_config({"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 8}})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mmfuse("fit", "--config", config, "--out", one, "--data.batch_size", "16").code == 0
    ran = run(["fit", "--config", config, "--out", two, "--data.batch_size", "8", *DDP])
    assert ran.returncode == 0, ran.stderr
    same_numbers(one, two, read_rows)
    lines = [(folder / "predictions.jsonl").read_text().splitlines() for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 28
    keys = [[json.loads(line)["key"] for line in each] for each in lines]
    assert keys[0] == keys[1], "answers of both ranks, in the order of the questions"
    assert read_json(two / "results.json")["n"] == 28


def test_two_ranks_train_an_adapter_like_one(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows
) -> None:
    """Checkpoints and the exported adapter are of what trains alone, whoever writes them."""
    adapter = {"kind": "lora", "r": 4, "targets": ["decoder.attention", "encoder.image"]}
    config = write_config({"model": {"adapter": adapter}, "trainer": {"val_check_interval": 8}})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mmfuse("fit", "--config", config, "--out", one, "--data.batch_size", "16").code == 0
    ran = run(["fit", "--config", config, "--out", two, "--data.batch_size", "8", *DDP])
    assert ran.returncode == 0, ran.stderr
    same_numbers(one, two, read_rows)
    assert any("lora_" in name for name in weights(two))
    saved, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-2, atol=2e-3, msg=name)


def test_two_ranks_resume(write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows, mmfuse: Command) -> None:
    """A run of one process is continued by two, with the same samples in each step."""
    long = write_config({"checkpoint_every": 1})
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert mmfuse("fit", "--config", long, "--out", whole, "--data.batch_size", "16").code == 0
    begun = mmfuse("fit", "--config", long, "--out", split, "--data.batch_size", "16", "--trainer.max_steps", "3")
    assert begun.code == 0
    ran = run(["fit", "--config", long, "--out", split, "--ckpt_path", "last", *DDP])
    assert ran.returncode == 0, ran.stderr
    same_numbers(whole, split, read_rows)


def threads() -> dict[str, str]:
    """Names of this process's threads by their numbers; empty where the system does not say."""
    tasks = Path("/proc/self/task")
    return {task.name: (task / "comm").read_text().strip() for task in tasks.iterdir()} if tasks.exists() else {}


def test_nothing_of_the_process_group_outlives_the_command(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Its threads abort a finished rank, now and then, while the interpreter shuts down; a command that inherits
    `LOCAL_RANK` starts no other ranks and waits for them for ever.
    """
    before, others = dict(os.environ), threads()
    words = ["fit", "--config", write_config(), "--out", tmp_path / "run", "--trainer.strategy", "ddp"]
    assert mmfuse(*words, "--trainer.devices", "1").code == 0
    assert not torch.distributed.is_initialized()
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert not [name for name in changed if "RANK" in name or "MASTER" in name or "WORLD" in name]
    # Commands that failed in earlier tests may have left theirs.
    assert not [name for task, name in threads().items() if "gloo" in name and task not in others]


def test_torchrun_starts_the_ranks_itself(write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows) -> None:
    """As `torchrun --nproc_per_node 2` does; also on top of an earlier run, which one rank moves aside."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["fit", "--config", write_config(), "--out", tmp_path / "run", *DDP]
    for _ in range(2):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "mmfuse", *map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                    "GROUP_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "test",
                    "OMP_NUM_THREADS": "1",
                },
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=240)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], errors
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run", "run.1"]
    for folder in ("run", "run.1"):
        assert [row["step"] for row in read_rows(tmp_path / folder)] == list(range(1, 9))
        assert (tmp_path / folder / "results.json").exists()
