"""Sharded checkpoints: whole or absent, free of pickles, and cut anew for another number of ranks."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmfuse.errors import ConfigError
from mmfuse.training.checkpoints import damage, read_checkpoint, resolve_checkpoint, sweep
from mmfuse.training.disk import CheckpointWriteError
from mmfuse.training.sharded_files import MANIFEST, PARTS, STATE, TENSORS, load_tensors, save_sharded

Calls = Callable[[Callable[[], Any], int], dict[str, Callable[..., Any]]]

DIED = 77


def join(store: Path, rank: int = 0, world: int = 1) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    join(tmp_path / "store")
    yield
    dist.destroy_process_group()


def save(step: int, folder: Path) -> None:
    tensors = {"weight/a": torch.full((30, 40), float(step)), "optimizer/0/a/step": torch.tensor(float(step))}
    save_sharded(tensors, {"global_step": step}, folder / "last.ckpt", folder / "previous.ckpt")


def held(path: Path) -> int:
    """The step of a whole checkpoint, by its tensors and by the rest."""
    assert damage(path) is None, path.name
    into: dict[str, Tensor] = {"weight/a": torch.empty(30, 40), "optimizer/0/a/step": torch.empty(())}
    load_tensors(into, path)
    step = int(read_checkpoint(path)["global_step"])
    assert all((tensor == step).all() for tensor in into.values())
    return step


@pytest.mark.usefixtures("one_rank")
def test_save_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3, 3):
        save(step, folder)
    assert held(folder / "last.ckpt") == held(folder / "previous.ckpt") == 3
    save(4, folder)
    assert [held(folder / f"{name}.ckpt") for name in ("last", "previous")] == [4, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", PARTS, "previous.ckpt"]
    assert len(list((folder / PARTS).iterdir())) == 2
    files = {path.name for path in (folder / "last.ckpt").iterdir()}
    assert files == {"__0_0.distcp", MANIFEST, STATE, TENSORS}, "and no .metadata, which is a pickle"
    assert resolve_checkpoint("last", folder.parent) == folder / "last.ckpt"


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_kill_at_each_point_of_a_save(tmp_path: Path, calls: Calls) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(step, folder)
    died = 0
    for point in count():
        child = os.fork()
        if child == 0:  # a process group of its own: threads are not forked
            try:
                dist.distributed_c10d._world = dist.distributed_c10d._World()
                join(tmp_path / f"store{point}")
                for name, call in calls(lambda: os._exit(DIED), point).items():
                    setattr(os, name, call)
                save(3, folder)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == DIED
        died += 1
        assert held(folder / "last.ckpt") in (2, 3) and held(folder / "previous.ckpt") in (1, 2, 3), point
        sweep(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", PARTS, "previous.ckpt"]
        save(2, folder)
    assert died >= 32


@pytest.mark.usefixtures("one_rank")
def test_disk_that_fails_at_each_point_of_a_save(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(step, folder)

    failed: list[int] = []

    def refuse() -> None:
        failed.append(point)
        raise OSError(28, "No space left on device")

    messages = []
    for point in count(step=2):
        with monkeypatch.context() as patch:
            for name, call in calls(refuse, point).items():
                patch.setattr(os, name, call)
            try:
                save(3, folder)
            except CheckpointWriteError as error:
                messages.append(str(error))
        if point not in failed:
            break
        assert held(folder / "last.ckpt") in (2, 3)
        sweep(folder)
        save(2, folder)
    assert len(messages) >= 12
    assert all("last.ckpt cannot be written: No space left on device; the one before" in one for one in messages)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "no manifest"])
def test_damaged_last_names_the_checkpoint_that_is_whole(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(step, folder)
    part = folder / "last.ckpt" / ("manifest.json" if harm == "no manifest" else "__0_0.distcp")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    if harm in ("gone", "no manifest"):
        part.unlink()
    else:
        part.write_bytes(data if harm == "bit" else data[:-10])
    with pytest.raises(ConfigError, match=r"last\.ckpt is damaged: .*previous\.ckpt is whole, of step 1"):
        resolve_checkpoint("last", tmp_path)


@pytest.mark.usefixtures("one_rank")
def test_table_that_names_other_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(1, folder)
    path = folder / "last.ckpt" / TENSORS
    table = json.loads(path.read_text())
    table["places"][0]["file"] = "../../../secret"
    path.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="names a file outside the folder"):
        load_tensors({"weight/a": torch.empty(30, 40)}, folder / "last.ckpt")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("name", "size"), [("weight/b", (30, 40)), ("weight/a", (40, 30))])
def test_tensor_of_another_model_is_refused(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    save(1, tmp_path)
    with pytest.raises(ConfigError, match=r"last\.ckpt: "):
        load_tensors({name: torch.empty(size)}, tmp_path / "last.ckpt")


def in_two_ranks(act: Callable[[int], str], folder: Path) -> list[str]:
    """What each of two forked processes returns, which are ranks of one group."""
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                join(folder / "store", rank, 2)
                (folder / f"said-{rank}").write_text(act(rank))
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    return [(folder / f"said-{rank}").read_text() for rank in range(2)]


def test_disk_of_one_rank_is_full(tmp_path: Path) -> None:
    """All ranks fail, none waits; what is written by two ranks is read by one."""
    folder = tmp_path / "checkpoints"

    def act(rank: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        for step in (1, 2):
            whole = torch.full((40_001,), float(step))
            cut = {"weight/a": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)}
            if step == 2 and rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            try:
                save_sharded(cut, {"global_step": step}, folder / "last.ckpt", None)
            except CheckpointWriteError as error:
                return str(error)
        return "saved"

    said = in_two_ranks(act, tmp_path)
    assert all("last.ckpt cannot be written: File too large; the one before is untouched" in one for one in said), said
    assert [path.name for path in (folder / PARTS).iterdir()] == ["last-1"]
    assert damage(folder / "last.ckpt") is None
    into = torch.empty(40_001)
    load_tensors({"weight/a": into}, folder / "last.ckpt")
    assert (into == 1).all()
