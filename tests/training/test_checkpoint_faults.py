"""A save that is killed, or refused by the disk, at each of its steps: `last` is the old one or the new one, whole."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfuse.training.checkpoints import AtomicCheckpointIO, damage, read_checkpoint, sweep
from mmfuse.training.disk import CheckpointWriteError

Calls = Callable[[Callable[[], Any], int], dict[str, Callable[..., Any]]]

DIED = 77
SIZE = 50_000


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((SIZE,), float(step))}


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """`last.ckpt` of step 2 and `previous.ckpt` of step 1."""
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(state(step), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def in_a_fork(prepare: Callable[[], None], path: Path) -> int:
    """Save step 3 in another process after `prepare`, and return its exit code; a signal's number is negative."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            AtomicCheckpointIO().save_checkpoint(state(3), path)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(calls: Calls, path: Path) -> Iterator[int]:
    """Kill a save before and behind each call, then in the middle of writing; what the process ended with each time."""
    for point in itertools.count():

        def patch(point: int = point) -> None:
            for name, call in calls(lambda: os._exit(DIED), point).items():
                setattr(os, name, call)

        code = in_a_fork(patch, path)
        if code == 0:
            break
        yield code
    size = path.stat().st_size
    for number in range(18):

        def limit(number: int = number) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * number // 18, resource.RLIM_INFINITY))

        yield in_a_fork(limit, path)


def test_kill_at_each_point_of_a_save(last: Path, calls: Calls) -> None:
    codes = []
    for code in kills(calls, last):
        codes.append(code)
        for path in (last, last.with_stem("previous")):
            assert damage(path) is None, f"{path.name} after {len(codes)} kills"
            held = read_checkpoint(path)
            assert (held["weights"] == held["step"]).all()
        assert read_checkpoint(last)["step"] in (2, 3)
        sweep(last.parent)
        assert sorted(file.name for file in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
        AtomicCheckpointIO().save_checkpoint(state(2), last)
    assert len(codes) >= 32 and codes.count(-signal.SIGXFSZ) == 18 and set(codes) == {DIED, -signal.SIGXFSZ}


def test_sigkill_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """Saves follow each other without a pause, so that nearly every kill hits one."""
    last = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(state(0), last)
    moments = random.Random(0)
    unfinished = 0
    for kill in range(32):
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(1000 * (kill + 1)):
                    AtomicCheckpointIO().save_checkpoint(state(step), last)
            finally:
                os._exit(1)
        time.sleep(0.005 + 0.03 * moments.random())
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        unfinished += (tmp_path / ".last.ckpt.tmp").exists()
        for path in tmp_path.glob("*.ckpt"):
            assert damage(path) is None, f"{path.name} after {kill + 1} kills"
            held = read_checkpoint(path)
            assert (held["weights"] == held["step"]).all()
    assert unfinished, "no kill hit a save"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_at_each_point_of_a_save(
    last: Path, calls: Calls, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[int] = []

    def refuse() -> None:
        failed.append(point)
        raise OSError(number, os.strerror(number))

    messages = []
    for point in itertools.count(step=2):
        with monkeypatch.context() as patch:
            for name, call in calls(refuse, point).items():
                patch.setattr(os, name, call)
            try:
                AtomicCheckpointIO().save_checkpoint(state(3), last)
                messages.append("")  # a folder that was to be made is there already
            except CheckpointWriteError as error:
                messages.append(str(error))
        if point not in failed:
            break
        assert damage(last) is None and damage(last.with_stem("previous")) is None
        replaced = not messages[-1] or "it is whole" in messages[-1]
        assert read_checkpoint(last)["step"] == (3 if replaced else 2)
        assert replaced or "the one before is untouched" in messages[-1]
        assert not messages[-1] or ("Make room" in messages[-1]) is (number == errno.ENOSPC)
        assert not list(last.parent.glob(".last*"))
        sweep(last.parent)
        AtomicCheckpointIO().save_checkpoint(state(2), last)
    assert sum("untouched" in message for message in messages) == 5
    assert sum("it is whole" in message for message in messages) == 2


def test_file_system_without_second_names_keeps_only_the_last(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    AtomicCheckpointIO().save_checkpoint(state(3), last)
    assert [read_checkpoint(path)["step"] for path in (last, last.with_stem("previous"))] == [3, 1]


@pytest.mark.slow
def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A disk of its own, of 4 MiB, in a mount namespace."""
    enter = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here (unshare --map-root-user --mount)")
    code = """
import sys, torch
from mmfuse.training.checkpoints import AtomicCheckpointIO, damage, read_checkpoint
from mmfuse.training.disk import CheckpointWriteError
from pathlib import Path
path = Path(sys.argv[1], "last.ckpt")
for step in range(1, 9):
    try:
        AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.ones(step * 100_000)}, path)
    except CheckpointWriteError as error:
        print(error)
        break
print("damage:", damage(path), "step:", read_checkpoint(path)["step"], "failed:", step)
"""
    mount = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec {sys.executable} -c '{code}' {tmp_path}"
    ran = subprocess.run([*enter, "sh", "-c", mount], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    message, facts = ran.stdout.splitlines()
    assert "cannot be written: No space left on device; the one before is untouched. Make room" in message
    assert facts == "damage: None step: 4 failed: 5"
