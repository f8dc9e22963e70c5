"""Worker processes that die or hang end the run with a message, and what they were reading is named."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmfuse.data.loader import StreamLoader, worker_death
from mmfuse.data.quarantine import Quarantine
from mmfuse.errors import RunError


class Numbers(IterableDataset[int]):
    """0, 1, 2 from one worker, which then does as it is told."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __iter__(self) -> Iterator[int]:
        assert get_worker_info() is not None
        yield from range(3)
        if self.fault == "hang":
            time.sleep(2.5)  # its end is waited for
        elif self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)


class Reading:
    """A stream of which the loader asks what it reads."""

    @staticmethod
    def reading() -> list[str]:
        return ["captions/train-0001.tar:000012", ""]


def watched(fault: str, timeout: float = 2.0) -> list[Any]:
    workers: Any = DataLoader(Numbers(fault), batch_size=None, num_workers=1, timeout=1)
    return list(StreamLoader(Reading(), timeout=timeout)._watched(workers))  # type: ignore[arg-type]


def test_worker_that_brings_nothing_is_named_with_its_sample() -> None:
    with pytest.raises(
        RunError,
        match=r"the data workers failed: no batch came in 2 seconds\. .* read: captions/train-0001\.tar:000012\.",
    ):
        watched("hang")


@pytest.mark.parametrize("timeout", [0.0, 30.0])
def test_worker_that_is_slow_is_waited_for(timeout: float) -> None:
    assert watched("hang", timeout) == [0, 1, 2]


@pytest.mark.parametrize("timeout", [0.0, 30.0])
def test_death_whose_signal_is_lost_is_noticed_all_the_same(timeout: float) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        workers: Any = DataLoader(Numbers("die"), batch_size=None, num_workers=1, timeout=1)
        batches = StreamLoader(Reading(), timeout=timeout)._watched(workers)  # type: ignore[arg-type]
        next(batches)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own stands there now
        with pytest.raises(RunError, match=r"the data workers failed: DataLoader worker .* exited unexpectedly"):
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_death_of_a_worker_is_a_message() -> None:
    """torch raises it from a signal handler, in the loader or wherever the process is."""
    with pytest.raises(RuntimeError) as raised:
        watched("die")
    assert isinstance(raised.value, RunError) or worker_death(raised.value) is not None


def test_death_is_told_from_other_errors() -> None:
    def raised(message: str) -> RuntimeError:
        error = RuntimeError("outer")
        error.__cause__ = RuntimeError(message)
        return error

    said = worker_death(raised("DataLoader worker (pid 77) is killed by signal: Killed. "))
    assert said is not None and "the data workers failed: DataLoader worker (pid 77) is killed" in str(said)
    assert worker_death(raised("DataLoader worker (pid(s) 7, 8) exited unexpectedly")) is not None
    assert worker_death(raised("shapes do not match")) is None


def test_a_worker_notes_what_it_reads() -> None:
    from multiprocessing.sharedctypes import RawArray

    bad = Quarantine(None)
    bad.notes = RawArray("c", 16)
    bad.attempt("a", "key", lambda: 1)
    assert bad.notes.value == b"a/key"
    bad.attempt("a", "k" * 100, lambda: 1)
    assert bad.notes.value == b"a/" + b"k" * 13
