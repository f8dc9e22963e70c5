"""Checkpoints are whole or absent, hold no code, and are found by name."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfuse.errors import ConfigError
from mmfuse.training.checkpoints import (
    AtomicCheckpointIO,
    damage,
    read_checkpoint,
    resolve_checkpoint,
    sweep,
)
from mmfuse.training.disk import CheckpointWriteError


class Stranger:
    """What only pickle can store."""


@pytest.mark.parametrize("first", [True, False], ids=["no checkpoint before", "one before"])
def test_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    path, save = tmp_path / "last.ckpt", torch.save
    if not first:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def broken(value: Any, file: Any) -> None:
        save(value, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(CheckpointWriteError, match=r"last\.ckpt cannot be written: No space left") as raised:
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(1000)}, path)
    assert ("untouched" in str(raised.value)) is not first
    assert [file.name for file in tmp_path.iterdir()] == ([] if first else ["last.ckpt"])
    if not first:
        assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}


def test_file_size_limit_of_the_process_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The system refuses a real write in its middle, as it does on a full disk."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    code = f"""
import resource, signal, torch
from mmfuse.training.checkpoints import AtomicCheckpointIO
from mmfuse.training.disk import CheckpointWriteError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    AtomicCheckpointIO().save_checkpoint({{"step": 2, "weights": torch.randn(100_000)}}, {str(path)!r})
except CheckpointWriteError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "last.ckpt cannot be written: File too large; the one before is untouched" in ran.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert damage(path) is None and AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}


def test_checkpoint_that_holds_other_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stranger.ckpt"
    torch.save({"state_dict": Stranger()}, path)
    with pytest.raises(
        ConfigError, match=r"stranger\.ckpt: this is no checkpoint of tensors and plain values"
    ) as raised:
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert isinstance(raised.value.__cause__, pickle.UnpicklingError)


@pytest.mark.parametrize("keep", [0, 10, -200])
def test_damaged_checkpoint_names_the_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"cut\.ckpt: .* or it is damaged"):
        read_checkpoint(path, map_location="cpu")


def test_write_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"step": step}, path)
        assert AtomicCheckpointIO().load_checkpoint(path) == {"step": step}
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert read_checkpoint(path.with_stem("previous")) == {"step": 1}


def test_what_a_killed_write_left_is_swept(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    (tmp_path / ".last.ckpt.tmp").write_bytes(b"half")
    sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("harm", ["bit", "cut", "empty"])
def test_damaged_last_names_the_checkpoint_that_is_whole(tmp_path: Path, harm: str) -> None:
    """A flipped bit among the weights loads without complaint; checksums know of it."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.full((5000,), 7.0)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"bit": bytes(data), "cut": bytes(data[:-300]), "empty": b""}[harm])
    with pytest.raises(
        ConfigError, match=r"last\.ckpt is damaged: .*previous\.ckpt is whole, of step 1: --ckpt_path prev"
    ):
        resolve_checkpoint("last", tmp_path)
    assert resolve_checkpoint("previous", tmp_path) == path.with_stem("previous")
    path.with_stem("previous").write_bytes(b"")
    with pytest.raises(ConfigError, match="no other checkpoint of the run is whole"):
        resolve_checkpoint("last", tmp_path)


def test_checkpoints_of_a_run_hold_tensors_and_plain_values(finished: Path) -> None:
    for name in ("last", "best"):
        held = torch.load(finished / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert all(value.isfinite().all() for value in held["state_dict"].values())
    assert held["global_step"] in (4, 8)


def test_checkpoint_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    for name in ("last", "best", "other"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / f"{name}.ckpt")
    other = tmp_path / "checkpoints" / "other.ckpt"
    assert resolve_checkpoint(None, tmp_path) is None
    assert resolve_checkpoint("last", tmp_path) == tmp_path / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint("best", tmp_path) == tmp_path / "checkpoints" / "best.ckpt"
    assert resolve_checkpoint(str(other), tmp_path) == other


@pytest.mark.parametrize(
    ("there", "says"),
    [([], "holds no checkpoint"), (["last"], "holds last.ckpt"), (["a", "b"], "holds a.ckpt, b.ckpt")],
)
def test_checkpoint_that_is_missing_says_what_is_there(tmp_path: Path, there: list[str], says: str) -> None:
    for name in there:
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / f"{name}.ckpt")
    with pytest.raises(FileNotFoundError) as raised:
        resolve_checkpoint("best", tmp_path)
    assert str(raised.value).startswith("--ckpt_path best: no checkpoint at")
    assert str(raised.value).endswith(f"checkpoints {says}")


def test_resuming_without_a_checkpoint_is_one_line(
    mmfuse: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    ran = mmfuse("fit", "--config", write_config(), "--out", tmp_path / "run", "--ckpt_path", "last")
    assert ran.code == 2 and not (tmp_path / "run").exists()
    assert ran.err.startswith("mmfuse: error: --ckpt_path last: no checkpoint at") and ran.err.count("\n") == 1


def test_pickled_checkpoint_is_one_line(
    mmfuse: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    torch.save({"global_step": Stranger(), "state_dict": {}}, tmp_path / "stranger.ckpt")
    words = ["--config", write_config(), "--out", tmp_path / "run", "--ckpt_path", tmp_path / "stranger.ckpt"]
    ran = mmfuse("test", *words)
    assert ran.code == 2 and "stranger.ckpt" in ran.err
