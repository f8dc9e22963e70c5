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
import yaml
from PIL import Image

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


def test_batch_of_text_alone_on_one_rank_does_not_hang(
    write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows
) -> None:
    """Samples without an image are so many that ranks meet batches without any."""
    records = [
        {"id": str(number), "messages": [{"role": "user", "content": "5"}, {"role": "assistant", "content": "7"}]}
        for number in range(16)
    ]
    image = tmp_path / "image.png"
    Image.new("L", (16, 16), 90).save(image)
    chat = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "1"}]
    records.append({"id": "image", "messages": chat, "image": "image.png"})
    (tmp_path / "chats.json").write_text(json.dumps(records))
    config = write_config()
    settings = yaml.safe_load(config.read_text())
    source = {"train": {"chats": {"path": str(tmp_path / "chats.json")}}, "batch_size": 1}
    settings["data"] = {"class_path": "MultimodalData", "init_args": source}
    rates = {"encoder": 1e-3, "connector": 1e-3, "decoder": 1e-3}
    settings["stages"] = [{"name": "s", "steps": 10, "data": {"chats": 1.0}, "lr": rates}]
    config.write_text(yaml.safe_dump(settings))
    ran = run(["fit", "--config", config, "--out", tmp_path / "run", *DDP])
    assert ran.returncode == 0, ran.stderr
    rows = read_rows(tmp_path / "run")
    assert len(rows) == 10 and all(row["train/loss"] < 100 for row in rows)


def test_no_thread_of_the_process_group_outlives_the_command(
    mmfuse: Command, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Such threads abort a finished rank, now and then, while the interpreter shuts down."""
    words = ["fit", "--config", write_config(), "--out", tmp_path / "run", "--trainer.strategy", "ddp"]
    assert mmfuse(*words, "--trainer.devices", "1").code == 0
    assert not torch.distributed.is_initialized()
    tasks = Path("/proc/self/task")
    if tasks.exists():
        threads = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        assert not [name for name in threads if "gloo" in name]


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
