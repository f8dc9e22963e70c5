"""Checkpoints are whole or absent, hold no code, and are found by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfuse.errors import ConfigError
from mmfuse.training.checkpoints import AtomicCheckpointIO, read_checkpoint, resolve_checkpoint


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
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(1000)}, path)
    assert path.exists() is not first
    if not first:
        assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}


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
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


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
